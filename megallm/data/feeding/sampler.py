"""Which samples a step reads, and which data-parallel rank and micro-batch each of them goes to."""

from collections.abc import Iterator

# Index of a sample in the dataset, and its place within the global batch.
SamplePlace = tuple[int, int]


class GlobalBatchSampler:
    """Walks the dataset from `consumed_samples` on, a global batch a step, in the order of Megatron's `single` loader.

    Iterating yields, for each step, this rank's micro-batches: a list of `global_batch_size / (micro_batch_size *
    data_parallel_size)` lists of `micro_batch_size` pairs (sample index, place within the global batch). Micro-batch k
    of rank r holds the places `(k * data_parallel_size + r) * micro_batch_size` and following. So the samples of a
    step, and the place of each, depend neither on the data-parallel size nor on the micro-batch size, and
    `consumed_samples` is all the state there is. An incomplete last batch is dropped.

    `len()` is the number of steps left. Iterating twice gives the same steps twice.

    Raises:
        ValueError: the global batch cannot be cut evenly, or a size or the rank is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        consumed_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        for name, value in [
            ("global batch size", global_batch_size),
            ("micro-batch size", micro_batch_size),
            ("data-parallel size", data_parallel_size),
        ]:
            if value < 1:
                raise ValueError(f"The {name} is {value}, but must be 1 at least.")
        if min(num_samples, consumed_samples) < 0:
            raise ValueError(
                f"{num_samples} samples, of which {consumed_samples} are consumed: neither may be negative."
            )
        assert 0 <= data_parallel_rank < data_parallel_size, (
            f"rank {data_parallel_rank} is not among {data_parallel_size}"
        )
        group = micro_batch_size * data_parallel_size
        if global_batch_size % group:
            lower = global_batch_size // group * group
            nearest = f"{lower} or {lower + group}" if lower else str(group)
            raise ValueError(
                f"A global batch of {global_batch_size} samples cannot be cut into micro-batches of {micro_batch_size} "
                f"on {data_parallel_size} data-parallel ranks ({micro_batch_size} x {data_parallel_size} = {group}); "
                f"{nearest} can."
            )
        self._num_samples, self._consumed_samples = num_samples, consumed_samples
        self._global_batch_size = global_batch_size
        # Places within the global batch, [micro-batches][micro_batch_size].
        starts = range(data_parallel_rank * micro_batch_size, global_batch_size, group)
        self._places = [range(start, start + micro_batch_size) for start in starts]

    def __len__(self) -> int:
        return max(0, self._num_samples - self._consumed_samples) // self._global_batch_size

    def __iter__(self) -> Iterator[list[list[SamplePlace]]]:
        for step in range(len(self)):
            first = self._consumed_samples + step * self._global_batch_size
            yield [[(first + place, place) for place in places] for places in self._places]
