"""diffusers' blocks with what they compute fused. Imported where diffusers is, and not before.

Each class is a subclass of the block that it serves, of the same name; `optimize` changes a block's class to
it, so `isinstance`, parameters, names, hooks and pickles stay as they were. A call that asks for something
that is not fused runs the original's forward over the same children.
"""

from __future__ import annotations

from typing import Any

from diffusers.models import attention, attention_processor, downsampling, resnet, upsampling
from diffusers.models.activations import GEGLU as _GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel as _Transformer2DModel
from torch import Tensor, nn

from sdfast import ops
from sdfast.drop_in import text
from sdfast.drop_in.layers import convolve, is_enabled, is_plain, normalize, project
from sdfast.models import layers

STOCK_PROCESSORS = (attention_processor.AttnProcessor2_0, attention_processor.AttnProcessor)


class ResnetBlock2D(resnet.ResnetBlock2D):
    """SiLU in the norms; time embedding and residual in the convolutions."""

    @staticmethod
    def why_not(block: resnet.ResnetBlock2D) -> str | None:
        """Why this class cannot serve `block`, or None."""
        if not isinstance(block.nonlinearity, nn.SiLU):
            return f"its activation is {type(block.nonlinearity).__name__}"
        if block.upsample is not None or block.downsample is not None:
            return "it changes the image's size between norm1 and conv1"
        if block.time_emb_proj is not None and block.time_embedding_norm not in ("default", "scale_shift"):
            return f"its time_embedding_norm is {block.time_embedding_norm!r}"
        return None

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not is_enabled() or args or kwargs:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, time = input_tensor, None
        if self.time_emb_proj is not None and temb is not None:
            time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        scale, shift = None, None
        if self.time_embedding_norm == "scale_shift":
            if time is None:
                return super().forward(input_tensor, temb)  # which says what is missing
            scale, shift = time.chunk(2, dim=1)
            time = None
        h = normalize(self.norm1, x, activation=self.nonlinearity)
        h = convolve(self.conv1, h, time_embedding=time)
        h = normalize(self.norm2, h, activation=self.nonlinearity, scale=scale, shift=shift)
        h = self.dropout(h)
        y = convolve(
            self.conv2, h, residual=x if self.conv_shortcut is None else convolve(self.conv_shortcut, x)
        )
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor


class Attention(attention_processor.Attention):
    """Online softmax, the residual in the last projection, the text's keys and values once."""

    @staticmethod
    def why_not(block: attention_processor.Attention) -> str | None:
        """Why this class cannot serve `block`, or None. Its processor is looked at in each call."""
        for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
            if getattr(block, name, None) is not None:
                return f"it has {name}"
        if block.to_k is None or block.to_out is None or block.inner_kv_dim != block.inner_dim:
            return "its heads are not those of plain multi-head attention"
        if not block.scale_qk or block.is_causal:
            return "its scores are scaled or masked in another way"
        return None

    def fuses(self, mask: Tensor | None, further: dict[str, Any]) -> bool:
        """Whether a call with this mask and further keywords may be fused."""
        further = {name: value for name, value in further.items() if value is not None and name != "temb"}
        return (
            is_enabled()
            and mask is None
            and not further
            and type(self.processor) in STOCK_PROCESSORS
            and not self.fused_projections
            and (type(self.processor) is not attention_processor.AttnProcessor or self._scales_as_usual())
        )

    def _scales_as_usual(self) -> bool:
        """Whether scores are to be multiplied by 1/√D; AttnProcessor2_0 does nothing else."""
        return bool(self.scale == (self.inner_dim // self.heads) ** -0.5)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        if not self.fuses(attention_mask, cross_attention_kwargs):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        return self.attend(hidden_states, encoder_hidden_states, None)

    def attend(self, x: Tensor, context: Tensor | None, residual: Tensor | None) -> Tensor:
        """x (N, L, C) or (N, C, H, W), context (N, S, E) or None, residual (N, L, C) or None -> as x."""
        size = x.shape[2:] if x.dim() == 4 else None
        tokens = x if size is None else layers.to_tokens(x)
        if self.residual_connection:
            assert residual is None
            residual = tokens
        if self.group_norm is not None:
            if size is None:
                tokens = self.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
            else:
                tokens = layers.to_tokens(normalize(self.group_norm, x))
        source = tokens if context is None else context

        def compute() -> tuple[Tensor, Tensor]:
            k, v = project(self.to_k, source), project(self.to_v, source)
            return _heads(self, k), _heads(self, v)

        cached = context is not None and all(is_plain(m, layers.Linear) for m in (self.to_k, self.to_v))
        k, v = text.keys_values(self, source, compute) if cached else compute()
        o = ops.attention(_heads(self, project(self.to_q, tokens)), k, v)
        o = o.transpose(1, 2).flatten(2)
        out, dropout = self.to_out[0], self.to_out[1]
        last = self.rescale_output_factor == 1 and not (dropout.training and dropout.p)
        y = dropout(project(out, o, residual=residual if last else None))
        if not last:
            y = (y if residual is None else y + residual) / self.rescale_output_factor
        return y if size is None else layers.to_image(y, *size)


def _heads(attention: attention_processor.Attention, tokens: Tensor) -> Tensor:
    """(N, L, heads * D) -> (N, heads, L, D)."""
    return tokens.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


class GEGLU(_GEGLU):
    """The gate in the projection."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not is_enabled() or args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        return project(self.proj, hidden_states, activation="geglu")


class FeedForward(attention.FeedForward):
    """The residual in the last projection."""

    def with_residual(self, x: Tensor, residual: Tensor) -> Tensor:
        """self(x) + residual, (N, L, C) each."""
        for module in self.net[:2]:
            x = module(x)
        if len(self.net) == 3:
            return project(self.net[2], x, residual=residual)
        return self.net[3](self.net[2](x)) + residual


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """The three residuals in the projections before them."""

    @staticmethod
    def why_not(block: attention.BasicTransformerBlock) -> str | None:
        """Why this class cannot serve `block`, or None."""
        if block.norm_type != "layer_norm":
            return f"its norm_type is {block.norm_type!r}"
        return "it adds positions to its tokens" if block.pos_embed is not None else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        given = cross_attention_kwargs or {}
        if not is_enabled() or self._chunk_size is not None or {"gligen", "scale"} & given.keys():
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        context = encoder_hidden_states
        own = context if self.only_cross_attention else None
        x = _attend(self.attn1, self.norm1(hidden_states), own, attention_mask, given, hidden_states)
        if self.attn2 is not None:
            x = _attend(self.attn2, self.norm2(x), context, encoder_attention_mask, given, x)
        h = self.norm3(x)
        return self.ff.with_residual(h, x) if is_plain(self.ff, FeedForward) else self.ff(h) + x


def _attend(
    block: Any, x: Tensor, context: Any, mask: Tensor | None, further: dict[str, Any], residual: Tensor
) -> Tensor:
    """block(x, context) + residual."""
    adds_nothing = is_plain(block, Attention) and not block.residual_connection
    if adds_nothing and block.rescale_output_factor == 1 and block.fuses(mask, further):
        return block.attend(x, context, residual)
    return block(x, encoder_hidden_states=context, attention_mask=mask, **further) + residual


class Transformer2DModel(_Transformer2DModel):
    """The projections of pixels as tokens, the residual in the last; its blocks are served by themselves."""

    @staticmethod
    def why_not(block: _Transformer2DModel) -> str | None:
        """Why this class cannot serve `block`, or None."""
        return None if block.is_input_continuous else "its input is no image of latents"

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if not is_enabled() or not self._takes_tokens(self.proj_in):
            return super()._operate_on_continuous_inputs(hidden_states)
        tokens = layers.to_tokens(normalize(self.norm, hidden_states))
        tokens = ops.linear(tokens, self.proj_in.weight, self.proj_in.bias)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if not is_enabled() or not self._takes_tokens(self.proj_out):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        tokens = ops.linear(
            hidden_states, self.proj_out.weight, self.proj_out.bias, residual=layers.to_tokens(residual)
        )
        return layers.to_image(tokens, height, width)

    def _takes_tokens(self, projection: Any) -> bool:
        if self.use_linear_projection:
            return is_plain(projection, layers.Linear)
        return is_plain(projection, layers.Conv2d) and projection.is_served()


class Upsample2D(upsampling.Upsample2D):
    """The nearest-2x upsample folded into the convolution."""

    @staticmethod
    def why_not(block: upsampling.Upsample2D) -> str | None:
        """Why this class cannot serve `block`, or None."""
        if block.norm is not None or block.use_conv_transpose or not block.use_conv or not block.interpolate:
            return "it is no nearest-2x upsample before a convolution"
        return None

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        doubled = tuple(2 * side for side in hidden_states.shape[2:])
        same = output_size is None or tuple(output_size) == doubled
        if not is_enabled() or not same or args or kwargs or not is_plain(conv, layers.Conv2d):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return layers.Conv2d.forward(conv, hidden_states, upsample=True)


class Downsample2D(downsampling.Downsample2D):
    """The zeros at the right and below without a padded copy."""

    @staticmethod
    def why_not(block: downsampling.Downsample2D) -> str | None:
        """Why this class cannot serve `block`, or None."""
        return None if block.use_conv and block.norm is None else "it has no convolution, or a norm before it"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv = self.conv
        fuses = is_plain(conv, layers.Conv2d) and conv.padding == (0, 0) and self.padding == 0
        if not is_enabled() or args or kwargs or not fuses:
            return super().forward(hidden_states, *args, **kwargs)
        return layers.Conv2d.forward(conv, hidden_states, padding=(0, 1, 0, 1))


_SERVED: dict[type[nn.Module], type[nn.Module]] = {
    ours.__mro__[1]: ours
    for ours in (
        ResnetBlock2D, Attention, GEGLU, FeedForward, BasicTransformerBlock, Transformer2DModel, Upsample2D,
        Downsample2D,
    )
}  # fmt: skip


def block_kind(block: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """What serves a block of diffusers' instead, or None, and why not."""
    ours = _SERVED.get(type(block))
    why_not = getattr(ours, "why_not", None)
    reason = why_not(block) if why_not else None
    return (None, reason) if reason else (ours, "")
