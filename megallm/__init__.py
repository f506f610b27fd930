"""megallm: pretraining and fine-tuning of transformers in tensor, pipeline and data parallelism."""

__version__ = "0.1.0"
