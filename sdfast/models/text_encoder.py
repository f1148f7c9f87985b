"""The CLIP text encoder that conditions Stable Diffusion (Radford et al. 2021, section 2.4).

    x_0 = token_embedding + position_embedding
    x   = x + W_o attention(LN(x)),  causal
    x   = x + W_2 act(W_1 LN(x))                                  one layer, N of them
    last_hidden_state = LN(x_N);  pooled = last_hidden_state at the end-of-text token (@ text_projection)

One class is both transformers' `CLIPTextModel` and, with a projection, `CLIPTextModelWithProjection`:
SD 1.x uses ViT-L/14 (quick_gelu), SD 2.x OpenCLIP ViT-H cut to 23 layers (gelu), SDXL both ViT-L/14 and
OpenCLIP bigG with its projection. Parameter names are those of transformers' checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sdfast import ops
from sdfast.models.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The keys of a text encoder's config.json. Defaults are those of transformers."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    # Where the sentence ends. 2 is what early exports say by mistake: there it is the largest token.
    eos_token_id: int = 49407
    pad_token_id: int = 1
    bos_token_id: int = 49406
    # ("CLIPTextModelWithProjection",) is the model with text_projection.
    architectures: tuple[str, ...] = ("CLIPTextModel",)

    def __post_init__(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act: got {self.hidden_act!r}, expected 'quick_gelu' or 'gelu'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_attention_heads="
                f"{self.num_attention_heads}"
            )
        if self.architectures not in (("CLIPTextModel",), ("CLIPTextModelWithProjection",)):
            raise ValueError(
                f"architectures: got {self.architectures}, expected CLIPTextModel or"
                " CLIPTextModelWithProjection"
            )

    @property
    def with_projection(self) -> bool:
        """Whether `pooled` goes through text_projection."""
        return self.architectures == ("CLIPTextModelWithProjection",)


class TextEncoding(NamedTuple):
    """What the U-Net may be conditioned on. All in the dtype of the weights."""

    last_hidden_state: Tensor  # (B, L, C), after the final LayerNorm
    pooled: Tensor  # (B, C), or (B, projection_dim) with a projection
    hidden_states: tuple[Tensor, ...]  # N+1 of (B, L, C), before the final LayerNorm: x_0 to x_N


class CLIPTextEncoder(nn.Module):
    """CLIP's text transformer."""

    config_class: ClassVar[type] = CLIPTextConfig
    fixed_config: ClassVar[dict[str, object]] = {"model_type": "clip_text_model", "attention_dropout": 0.0}
    # How it was initialised, and what transformers notes for every kind of model (generation, labels).
    ignored_config: ClassVar[frozenset[str]] = frozenset(
        {
            "initializer_factor", "initializer_range", "dropout", "dtype",
            "torch_dtype", "transformers_version", "return_dict", "id2label",
            "label2id", "chunk_size_feed_forward", "diversity_penalty", "early_stopping",
            "encoder_no_repeat_ngram_size", "length_penalty", "max_length", "min_length",
            "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
            "pruned_heads", "repetition_penalty", "temperature", "tie_word_embeddings",
            "top_k", "top_p", "typical_p", "use_cache",
        }
    )  # fmt: skip

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = _TextTransformer(config)
        if config.with_projection:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor, *, clip_skip: int = 0) -> TextEncoding:
        """Encode tokens.

        Args:
            input_ids: (B, L) integers, L at most `max_position_embeddings`.
            clip_skip: leave out that many of the last layers in `last_hidden_state` (1 is what users call
                "clip skip 2"). `pooled` always comes from all of them.

        Raises:
            TypeError, ValueError: a wrong dtype, rank, length or `clip_skip`.
        """
        self._check(input_ids, clip_skip)
        hidden_states = self.text_model.encoder(self.text_model.embeddings(input_ids))
        final_layer_norm = self.text_model.final_layer_norm
        full = final_layer_norm(hidden_states[-1])
        pooled = full[torch.arange(full.shape[0], device=full.device), self._end_of_text(input_ids)]
        if self.config.with_projection:
            pooled = self.text_projection(pooled)
        last = final_layer_norm(hidden_states[-1 - clip_skip]) if clip_skip else full
        return TextEncoding(last, pooled, hidden_states)

    def _check(self, input_ids: Tensor, clip_skip: int) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: got dtype {input_ids.dtype}, expected int64 or int32")
        longest = self.config.max_position_embeddings
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= longest:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}, expected (B, L) with 1 <= L <= {longest}"
            )
        if not 0 <= clip_skip <= self.config.num_hidden_layers:
            raise ValueError(f"clip_skip: got {clip_skip}, expected 0 to {self.config.num_hidden_layers}")

    def _end_of_text(self, input_ids: Tensor) -> Tensor:
        """(B,) positions of the end-of-text token: the first one, since padding may repeat it."""
        if self.config.eos_token_id == 2:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)


class _TextTransformer(nn.Module):
    """Holds the parts under the names of the checkpoints."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class _Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, L) -> (B, L, C)
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class _Layers(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (B, L, C) -> its state before and after each layer
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class _Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = _CausalSelfAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, C) -> same
        x = self.self_attn(self.layer_norm1(x), residual=x)
        return self.mlp(self.layer_norm2(x), residual=x)


class _CausalSelfAttention(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, *, residual: Tensor) -> Tensor:  # (B, L, C) -> same
        q, k, v = (  # (B, heads, L, D)
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = ops.attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2), residual=residual)


class _MLP(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.activation = config.hidden_act

    def forward(self, x: Tensor, *, residual: Tensor) -> Tensor:  # (B, L, C) -> same
        return self.fc2(self.fc1(x, activation=self.activation), residual=residual)
