"""The families of models, a table each."""

from megallm.convert.families.bert import BERT_MASKED_LM, BERT_MODEL, BERT_PRETRAINING
from megallm.convert.families.gpt2 import GPT2
from megallm.convert.families.gpt_neox import GPT_NEOX
from megallm.convert.families.llama import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from megallm.convert.family import Family

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GPT2, GPT_NEOX),
    *(BERT_PRETRAINING, BERT_MASKED_LM, BERT_MODEL),
)
"""Where several can hold a model of ours, the first one is taken; where no architecture is named, the last of a
type."""

_GEMMA2 = "norms behind the attention and the MLP, caps on scores and logits, and windows in every other layer only"
_GEMMA3 = "norms behind the attention and the MLP, and windows with rotary angles of their own in most layers"
_EXPERTS = "mixture of experts"
LACKING: dict[str, str] = {
    "Gemma2ForCausalLM": _GEMMA2,
    **dict.fromkeys(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _GEMMA3),
    **dict.fromkeys(
        ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"), _EXPERTS
    ),
    **dict.fromkeys(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"), "latent attention and mixture of experts"),
}
"""Architectures that many ask for, with what of them cannot be converted."""
