"""A ComfyUI node: the attention of a diffusion model by sdfast.

Copy this file into ComfyUI/custom_nodes/ of an installation whose Python has sdfast. The node goes between a
model loader and a sampler. It works on a clone of the model, and hands what it does not compute (masks,
other precisions, shapes that it does not know) to the override that was there before, or to ComfyUI's own.
"""

from __future__ import annotations

from sdfast import ops

OVERRIDE = "optimized_attention_override"


def make_override(previous=None):
    """An override as ComfyUI calls it: with the function that it would have used, then its arguments."""

    def override(
        original, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
        skip_output_reshape=False, **keywords,
    ):  # fmt: skip
        if (
            mask is not None
            or attn_precision is not None
            or not _is_plain(q, k, v, heads, skip_reshape, keywords)
        ):
            given = dict(
                keywords, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
            )  # fmt: skip
            if previous is not None:
                return previous(original, q, k, v, heads, **given)
            return original(q, k, v, heads, **given)
        if not skip_reshape:  # (B, L, heads * D) -> (B, heads, L, D)
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = ops.attention(q, k, v)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def _is_plain(q, k, v, heads, skip_reshape, keywords) -> bool:
    """Whether it is multi-head attention with the usual scale, of tensors of one dtype."""
    rank = 4 if skip_reshape else 3
    if not all(t.dim() == rank and t.dtype == q.dtype and t.device == q.device for t in (q, k, v)):
        return False
    same_heads = not skip_reshape or q.shape[1] == k.shape[1] == v.shape[1] == heads
    scaled = keywords.get("scale") is not None or keywords.get("enable_gqa", False)
    return same_heads and k.shape == v.shape and not scaled


class SdfastAttention:
    """The node."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802  ComfyUI's names
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sdfast"
    DESCRIPTION = "Attention by sdfast's kernels, for this model alone."

    def patch(self, model):
        """A clone whose attention is sdfast's."""
        patched = model.clone()
        options = dict(patched.model_options.get("transformer_options", {}))
        options[OVERRIDE] = make_override(options.get(OVERRIDE))
        patched.model_options = {**patched.model_options, "transformer_options": options}
        return (patched,)


NODE_CLASS_MAPPINGS = {"SdfastAttention": SdfastAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"SdfastAttention": "Attention by sdfast"}
