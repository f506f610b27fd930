"""What can be known about a run before it starts: its errors, its layers per stage, its FLOPs. Needs no torch."""
