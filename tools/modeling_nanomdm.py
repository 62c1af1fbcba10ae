"""A nanoMDM network as a model of `transformers`: a wrapper of model, diffusion and strategies.

`python -m tools.export` copies this file and the three, unchanged, into a folder that
`AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)` loads.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .diffusion import sample
from .model import ModelConfig, Transformer, rope_tables
from .strategies import from_config


class NanoMDMConfig(PretrainedConfig):
    """`network` holds the fields of a `ModelConfig`."""

    model_type = "nanomdm"

    def __init__(self, network: dict | None = None, **others):
        self.network = network or {}
        super().__init__(**others)


class NanoMDMForMaskedLM(PreTrainedModel):
    """Ids with masks (B, L) in, logits (B, L, V) out; the mask is id V and has no logit."""

    config_class = NanoMDMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]

    def __init__(self, config: NanoMDMConfig):
        super().__init__(config)
        self.transformer = Transformer(ModelConfig(**config.network))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Compute again what no file stores: `from_pretrained` builds without memory."""
        if isinstance(module, Transformer):
            c = module.config
            tables = rope_tables(c.block_size, c.head_size, c.rope_base, c.rope_rounded)
            module.cos, module.sin = (table.to(module.device) for table in tables)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.transformer.embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_,
    ) -> MaskedLMOutput:
        """The loss is the mean cross-entropy where `labels` (B, L) are not -100.

        Raises `ValueError` for padding, which bidirectional attention would see.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask has zeros: give rows of one length, without padding")
        logits = self.transformer(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)

    def fill(
        self,
        input_ids: torch.Tensor,
        seed: int = 0,
        *,
        strategy: str = "stochastic",
        steps: int = 32,
        temperature: float = 1.0,
        **options,
    ) -> torch.Tensor:
        """Ids (B, L) with every mask replaced by a token drawn from the model.

        `strategy` is a name in `strategies.STRATEGIES`; `options` are its arguments, and `top_k`,
        `top_p`, `guidance`, `block_length`. Raises `ValueError`.
        """
        section = SimpleNamespace(
            strategy=strategy, steps=steps, temperature=temperature, options=options
        )
        is_masked = input_ids == self.transformer.config.mask_id
        generator = torch.Generator().manual_seed(seed)
        sampler = from_config(section, sample, False, self.transformer.config.block_length)
        return sampler.fill(self.transformer, input_ids, is_masked, generator=generator).ids
