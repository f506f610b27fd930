"""What a job of preprocessing does."""

from dataclasses import dataclass
from pathlib import Path

from megallm.data.prepare.encoding import EncodeSettings
from megallm.data.prepare.shards import Shard, dataset_prefix
from megallm.data.text.inputs import STANDARD_INPUT
from megallm.data.text.raw import MAX_DOCUMENT_BYTES


@dataclass(frozen=True)
class JobSettings:
    """What a job does.

    Attributes:
        paths: the input.
        output_prefix: start of the paths of the output.
        encode: how documents become tokens.
        shard: share of the input that is done; None for all.
        max_document_bytes: the longest document that is taken.
        overwrite: an output or a work folder of other conditions is replaced.
        keep: the work folder stays after an error that ends the job.
        journal_seconds: time between two journals.
    """

    paths: tuple[Path, ...]
    output_prefix: str
    encode: EncodeSettings
    shard: Shard | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    overwrite: bool = False
    keep: bool = False
    journal_seconds: float = 5.0

    @property
    def job_prefix(self) -> str:
        """Start of the paths of this shard's output."""
        return self.output_prefix + (self.shard.suffix if self.shard else "")

    def dataset_prefix(self, key: str) -> str:
        """Megatron's name for the dataset of one key, without .bin or .idx."""
        return dataset_prefix(self.job_prefix, key, self.encode.sentence_language is not None)

    @property
    def can_resume(self) -> bool:
        return STANDARD_INPUT not in self.paths
