"""Every CUDA operator by the checks that the CPU's passes, and in what only a GPU has."""

import pytest
import torch

from megallm.ops.initial import normal_box, uniform_box
from megallm.ops.library import NATIVE
from tests.unit.ops import accuracy
from tests.unit.ops.accuracy import Case
from tests.unit.ops.cases import CASES
from tests.unit.ops.test_ops_initial import BOXES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not NATIVE.cuda_architectures, reason="built without CUDA operators"),
]
BUILT = [case for case in CASES if case.operator in NATIVE.on_cuda]
every_case = pytest.mark.parametrize("case", BUILT, ids=str)


@every_case
def test_error_is_at_most_twice_that_of_eager(case: Case):
    accuracy.check_shapes(case, "cuda", case.shapes)


@pytest.mark.parametrize(
    "check",
    [
        accuracy.check_views_of_kernels,
        accuracy.check_each_unaligned,
        accuracy.check_determinism,
        accuracy.check_non_finite,
        accuracy.check_compiles,
    ],
)
@every_case
def test_as_on_the_cpu(case: Case, check):
    check(case, "cuda")


@every_case
def test_gradcheck(case: Case):
    accuracy.check_gradients(case, "cuda", "native")


@every_case
def test_runs_on_the_current_stream_and_in_a_graph(case: Case):
    inputs = case.inputs((64, 4096), case.dtypes[0], "cuda")
    grads = case.output_gradients(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.results(inputs, grads, "native")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.results(inputs, grads, "native")
    name = next(name for name, tensor in inputs.items() if tensor.is_floating_point())
    with torch.no_grad():
        inputs[name].copy_(inputs[name].flip(0))
    graph.replay()
    accuracy.check_same(captured, case.results(inputs, grads, "native"), exact=True, what=f"{case.name} replayed")


@every_case
def test_on_a_device_that_is_not_current(case: Case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    with torch.cuda.device(0):
        accuracy.check_accuracy(case, (8, 256), case.dtypes[0], "cuda:1")


def test_a_row_of_a_table_that_nearly_all_tokens_use():
    accuracy.check_a_much_used_row("cuda")


def test_gelu_of_every_number_of_16_bits():
    accuracy.check_gelu_of_every_number("cuda")


def test_no_gradient_where_nothing_is_seen():
    accuracy.check_unseen_keys("cuda")


@pytest.mark.parametrize("shape", [(5, 3, 7), (0, 3, 7), (1, 1, 1), (64, 96, 128), (512, 1024, 256)], ids=str)
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
def test_weight_gradients_add_up(dtype: torch.dtype, shape: tuple[int, int, int]):
    accuracy.check_weight_gradients("cuda", dtype, shape)


@pytest.mark.parametrize("box_of", [normal_box, uniform_box])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_initial_values_have_the_bits_of_the_cpu(box_of, box):
    on_gpu = box_of(7, "weight", *box, torch.device("cuda"), "native")
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), box_of(7, "weight", *box, implementation="native"))
