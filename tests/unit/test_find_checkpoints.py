"""What a folder of checkpoints may hold instead of one."""

from pathlib import Path

import pytest

from megallm.checkpoint.load import find_checkpoints


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["config.json", "model-00001-of-00002.safetensors"], "is a Hugging Face model .* --load-hf"),
        (["config.json", "pytorch_model.bin"], "is a Hugging Face model"),
        (["iter_0000010/config.json", "iter_0000010/model.safetensors"], "iter_0000010 is a Hugging Face model"),
        (["iter_0000010/mp_rank_00/model_optim_rng.pt"], "iter_0000010 was saved by Megatron: .*--from megatron"),
        (["iter_0000010/.metadata"], "iter_0000010 was saved by Megatron"),
        (["release/mp_rank_00_000/model_optim_rng.pt"], "release was saved by Megatron"),
        (["iter_0000010/rank_00000.safetensors"], "iter_0000010 has no manifest.json: it is damaged"),
    ],
)
def test_a_model_of_another_format_is_no_reason_to_start_afresh(tmp_path: Path, files: list[str], wanted: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=wanted):
        find_checkpoints(str(tmp_path))


def test_what_others_keep_beside_checkpoints_hinders_no_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "notes").mkdir()
    assert find_checkpoints(str(tmp_path)) == []
    assert find_checkpoints(str(tmp_path / "not there")) == []
