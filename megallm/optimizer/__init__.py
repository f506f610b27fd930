"""AdamW, gradient norm and clipping, learning-rate schedules: functions of tensors that know nothing of layouts."""
