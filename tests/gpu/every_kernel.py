"""Runs every CUDA kernel of ours once for each dtype and both widths of access, for a tool that watches them.

No test of its own: `test_sanitizer.py` starts it.
"""

import torch

from megallm.ops.initial import normal_box
from tests.unit.ops import accuracy
from tests.unit.ops.cases import CASES


def main() -> None:
    # Whole vectors and not; rows for a warp and for a block, the last longer than what registers hold.
    for case in CASES:
        for shape in ((7, 33), (150, 64), (3, 1032), (2, 16392)):
            for dtype, wide in accuracy.variants(case):
                if shape[-1] < 4096 or dtype in (torch.float32, torch.bfloat16):
                    inputs = case.inputs(shape, dtype, "cuda", wide=wide)
                    case.results(inputs, case.output_gradients(inputs), "native")
    normal_box(7, "weight", (40, 300), (7, 3), (20, 290), torch.device("cuda"), "native")
    accuracy.check_a_much_used_row("cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
