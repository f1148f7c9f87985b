"""What an operator of a profile is part of, for the page, which needs no torch."""

# By words in its name: the first kind that fits.
KINDS = {
    "convolution": ("conv",),
    "attention": ("attention", "softmax"),
    "linear": ("linear", "addmm", "::mm", "bmm", "gelu"),
    "normalisation": ("norm", "silu"),
    "copies": ("copy", "cat", "clone", "upsample", "::add", "::mul", "empty"),
}


def kind(operator: str) -> str:
    """Of `KINDS`, "outside", or "other"."""
    if operator == "outside":
        return operator
    return next((name for name, words in KINDS.items() if any(w in operator for w in words)), "other")
