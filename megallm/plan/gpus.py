"""GPUs by name: what their makers state, and which part of it is assumed to be reached. Needs no torch.

Memory, bandwidths and dense 16-bit rates are those of NVIDIA's data sheets. The efficiencies are assumptions, the same
for all: the best matrix product of any shape reaches 80% of an H100's peak (MAMF, stas00/ml-engineering), those of a
layer somewhat less; causal attention, forward and backward, about 45% in operations of the model (FlashAttention-3,
arXiv:2407.08608: 640 TFLOP/s forward and 540 backward, of which a fifth recomputes); copies 85 to 90% of the memory's
bandwidth; collectives three quarters of a link's. None of them was measured with this engine.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the stated rates that are reached: in matrix products, in attention, in copies, in collectives."""

    product: float = 0.70
    attention: float = 0.45
    bandwidth: float = 0.85
    link: float = 0.75


@dataclass(frozen=True)
class Gpu:
    """A device in its usual machine. Rates are per second, of one device and in one direction.

    `flops` is the dense peak of 16-bit matrix products, `flops_32` that of float32 ones. `link` joins the GPUs of a
    machine, `network` the machines. `operator_seconds` is what starting an operator costs where it cannot be hidden.
    """

    name: str
    memory: int
    flops: float
    flops_32: float
    bandwidth: float
    link: float
    network: float
    per_machine: int = 8
    efficiencies: Efficiencies = Efficiencies()
    operator_seconds: float = 0.0


CONTEXT_BYTES = GIB // 2
"""Of a process on a GPU, before it does anything."""

COMMUNICATOR_BYTES = GIB // 2
"""Of each NCCL communicator: the figure of Fujii et al. 2024 (arXiv:2411.06465)."""

SAFE_SHARE = 0.8
"""Plans below this share of the memory never ran out of it in their 454 runs: fragments, workspaces take the rest."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 40 * GIB, 312e12, 19.5e12, 1.555e12, 300e9, 25e9),
        Gpu("A100-80", 80 * GIB, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
        Gpu("H100", 80 * GIB, 989.4e12, 67e12, 3.35e12, 450e9, 50e9),
        Gpu("H200", 140 * GIB, 989.4e12, 67e12, 4.8e12, 450e9, 50e9),
        Gpu("B200", 180 * GIB, 2250e12, 80e12, 8e12, 900e9, 50e9),
        Gpu("L40S", 45 * GIB, 362e12, 91.6e12, 0.864e12, 25e9, 25e9),
        Gpu("RTX-4090", 24 * GIB, 165.2e12, 82.6e12, 1.008e12, 25e9, 12.5e9),
    )
}
DEFAULT_GPU = "H100"
