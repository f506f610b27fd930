"""Settings that are more than a name in another language: heads, activations, widths, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megallm.config.resolve import attention_window, kv_channels, num_query_groups
from megallm.config.tree import ModelConfig
from megallm.convert.family import Special


@dataclass(frozen=True)
class GroupedHeads(Special):
    """Query heads, key/value heads and their width; the latter two may be left out."""

    ours = ("num_attention_heads", "num_query_groups", "kv_channels")

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        heads = theirs["num_attention_heads"]
        groups = theirs.get("num_key_value_heads") or heads
        width = theirs.get("head_dim") or theirs["hidden_size"] // heads
        values = {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": width}
        return values | {"group_query_attention": groups != heads}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": num_query_groups(model),
            "head_dim": kv_channels(model),
        }


@dataclass(frozen=True)
class PlainHeads(Special):
    """As many key/value heads as query heads, which together are as wide as the residual stream."""

    key: str
    hidden_key: str = "hidden_size"
    ours = ("num_attention_heads", "num_query_groups", "kv_channels")

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        heads = theirs[self.key]
        return {
            "num_attention_heads": heads,
            "num_query_groups": heads,
            "kv_channels": theirs[self.hidden_key] // heads,
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        heads = model.num_attention_heads
        if num_query_groups(model) != heads:
            raise ValueError(f"num_query_groups {model.num_query_groups} (it has one for each of {heads} heads)")
        if kv_channels(model) * heads != model.hidden_size:
            raise ValueError(f"kv_channels {model.kv_channels} (it has hidden_size / heads)")
        return {self.key: heads}


@dataclass(frozen=True)
class Activation(Special):
    """The activation of the MLP: our name for each of theirs. Of several keys the first one that is given counts."""

    keys: tuple[str, ...]
    names: Mapping[str, str]
    ours = ("activation",)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        name = next((theirs[key] for key in self.keys if key in theirs), "")
        if name not in self.names:
            raise ValueError(f"the activation {name!r} is not one that megallm has; known are {', '.join(self.names)}")
        return {"activation": self.names[name]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        for theirs, ours in self.names.items():
            if ours == model.activation:
                return dict.fromkeys(self.keys, theirs)
        raise ValueError(f"activation {model.activation!r} (it has {', '.join(self.names.values())})")


@dataclass(frozen=True)
class InnerWidth(Special):
    """The width of the MLP, four times the residual stream's where it is left out."""

    key: str
    hidden_key: str
    ours = ("ffn_hidden_size",)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {"ffn_hidden_size": theirs.get(self.key) or 4 * theirs[self.hidden_key]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.key: model.ffn_hidden_size}


@dataclass(frozen=True)
class SlidingWindow(Special):
    """How many positions a token looks at: theirs counts its own, ours those before it."""

    key: str
    ours = ("window_size",)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        window = theirs.get(self.key)
        return {"window_size": None if window is None else f"{window - 1},0"}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        before = attention_window(model)
        return {self.key: None if before is None else before + 1}


@dataclass(frozen=True)
class Rotary(Special):
    """Rotary positions in the forms of both versions of the library.

    Version 4 reads `rope_theta` and `rope_scaling` only, version 5 writes `rope_parameters` only and reads both: both
    are written.
    """

    base_key: str = "rope_theta"
    share_key: str | None = None
    share: float = 1.0
    """Of a head's channels that turn, where it is left out. Without `share_key` all do."""
    ours = (
        "rotary_base",
        "rotary_percent",
        "rotary_seq_len_interpolation_factor",
        "use_rope_scaling",
        "rope_scaling_factor",
        "rope_scaling_low_freq_factor",
        "rope_scaling_high_freq_factor",
        "rope_scaling_original_length",
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        rope = self._merged(theirs)
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"megallm has rotary positions of one kind in all layers, not of {', '.join(rope)}")
        share = rope.get("partial_rotary_factor", theirs.get(self.share_key or "partial_rotary_factor", self.share))
        if share != 1.0 and self.share_key is None:
            raise ValueError(f"a partial_rotary_factor of {share} is not one that this architecture computes with")
        values = {"rotary_base": float(rope.get("rope_theta", theirs.get(self.base_key, 10000.0)))}
        if self.share_key is not None:
            values["rotary_percent"] = share
        kind = rope.get("rope_type", "default")
        if kind == "default":
            return values
        if kind == "linear":
            return values | {"rotary_seq_len_interpolation_factor": float(rope["factor"])}
        if kind == "llama3":
            return values | {
                "use_rope_scaling": True,
                "rope_scaling_factor": float(rope["factor"]),
                "rope_scaling_low_freq_factor": float(rope["low_freq_factor"]),
                "rope_scaling_high_freq_factor": float(rope["high_freq_factor"]),
                "rope_scaling_original_length": rope.get(
                    "original_max_position_embeddings", theirs["max_position_embeddings"]
                ),
            }
        raise ValueError(
            f"megallm does not have rotary positions of the kind {kind!r}, only default, linear and llama3: texts "
            "beyond the original length would be read with other angles"
        )

    def _merged(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """What both forms say. Raises ValueError where one says something else than the other."""
        one, other = (self._form(theirs, key) for key in ("rope_parameters", "rope_scaling"))
        apart = [
            f"{name} is {one[name]!r} in rope_parameters and {other[name]!r} in rope_scaling"
            for name in one
            if name in other and one[name] != other[name]
        ]
        rope, base = one | other, theirs.get(self.base_key)
        if base is not None and rope.get("rope_theta", base) != base:
            place = "rope_scaling" if "rope_theta" in other else "rope_parameters"
            apart.append(f"{self.base_key} is {base!r}, and rope_theta in {place} {rope['rope_theta']!r}")
        if apart:
            raise ValueError(
                f"rotary positions are described twice, and not alike: {'; '.join(apart)}; leave only those with which "
                "the model was trained"
            )
        return rope

    def _form(self, theirs: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One form's entries, with the newer name of the kind."""
        entries = {} | (theirs.get(key) or {})
        kind = entries.pop("type", None)
        return entries if kind is None else {"rope_type": kind} | entries

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scaling: dict[str, Any] = {}
        if model.use_rope_scaling and model.rotary_seq_len_interpolation_factor is not None:
            raise ValueError("use_rope_scaling together with rotary_seq_len_interpolation_factor (it has one of them)")
        if model.rotary_percent != 1.0 and self.share_key is None:
            raise ValueError(f"rotary_percent {model.rotary_percent} (it has 1.0)")
        if model.rotary_seq_len_interpolation_factor is not None:
            scaling = {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
        if model.use_rope_scaling:
            scaling = {
                "rope_type": "llama3",
                "factor": model.rope_scaling_factor,
                "low_freq_factor": model.rope_scaling_low_freq_factor,
                "high_freq_factor": model.rope_scaling_high_freq_factor,
                "original_max_position_embeddings": model.rope_scaling_original_length,
            }
        rope = {"rope_type": "default", "rope_theta": model.rotary_base} | scaling
        entries: dict[str, Any] = {self.base_key: model.rotary_base, "rope_scaling": scaling or None}
        if self.share_key is not None:
            rope["partial_rotary_factor"] = entries[self.share_key] = model.rotary_percent
        return entries | {"rope_parameters": rope}
