"""One step of `train ldm`'s U-Net against Algorithm 1 in fp64 and the texts of diffusers."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipelines  # noqa: E402

from sdfast.diffusion import NoiseSchedule  # noqa: E402
from sdfast.training.images import CaptionedImage  # noqa: E402
from sdfast.training.ldm_losses import Denoising  # noqa: E402
from sdfast.training.ldm_parts import load_parts, texts_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("exact_numerics")  # what is wired wrongly would hide in less


class Recording:
    """Stands in for the U-Net: keeps what it is called with."""

    dtype = torch.float64

    def __call__(self, x_t, t, states, added=None):
        self.x_t, self.t, self.states, self.added = x_t, t, states, added
        return 0.3 * x_t


@pytest.mark.parametrize("is_xl", [False, True])
def test_denoising_is_algorithm_1_on_captions_some_of_them_dropped(tmp_path, is_xl):
    make = tiny_pipelines.sdxl_pipeline if is_xl else tiny_pipelines.sd_pipeline
    parts = load_parts(make(tmp_path / "tiny"), prediction="v_prediction", device=torch.device("cpu"))
    captions = ["seven", "and seven!!", "an and"]
    moments = torch.randn(3, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    model = Recording()
    loss = Denoising(
        model, [CaptionedImage(tmp_path / f"{i}.png", f"{i}.png", c) for i, c in enumerate(captions)],
        [(20, 70), (40, 48), (16, 24)], [(16, 24)] * 3, moments.__getitem__, texts_of(parts),
        NoiseSchedule.from_config(parts["scheduler"]), 0.5, 0.5, 5.0, torch.device("cpu"),
    )  # fmt: skip
    rows = [2, 0, 1, 0, 1, 2]
    value = loss([(row, torch.Generator().manual_seed(i)) for i, row in enumerate(rows)])

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    timesteps, x, errors, given = [], [], [], []
    for i, row in enumerate(rows):
        generator = torch.Generator().manual_seed(i)
        timesteps.append(int(torch.randint(1000, (1,), generator=generator)))
        given.append(bool(torch.rand((), generator=generator) >= 0.5))
        draw, noise = (torch.randn(1, 4, 2, 3, generator=generator)[0].double() for _ in range(2))
        mean, logvar = moments[row].double().chunk(2)
        z0 = 0.5 * (mean + (logvar / 2).exp() * draw)
        kept = (1 - betas[: timesteps[-1] + 1]).prod()
        x.append(kept.sqrt() * z0 + (1 - kept).sqrt() * noise)
        target = kept.sqrt() * noise - (1 - kept).sqrt() * z0
        snr = kept / (1 - kept)
        errors.append(snr.clamp(max=5) / (snr + 1) * (0.3 * x[-1] - target).square().mean())
    assert model.t.tolist() == timesteps
    assert torch.allclose(model.x_t, torch.stack(x), rtol=1e-5, atol=1e-5)
    assert value.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)

    assert set(given) == {True, False}
    kind = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(tmp_path / "tiny")
    for i, row in enumerate(rows):
        text = captions[row] if given[i] else ""
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        states, _, *pooled = pipe.encode_prompt(text, **options)
        zero = is_xl and not given[i]  # of SDXL's force_zeros_for_empty_prompt
        assert torch.allclose(model.states[i], (0.0 if zero else 1.0) * states[0].double(), atol=1e-5)
        if is_xl:
            expected = (0.0 if zero else 1.0) * pooled[0][0].double()
            assert torch.allclose(model.added["text_embeds"][i], expected, atol=1e-5)
    if is_xl:  # own height and width, what is cut off above and to the left, as resized, height and width
        ids = [[20, 70, 0, 16, 16, 24], [40, 48, 2, 0, 16, 24], [16, 24, 0, 0, 16, 24]]
        assert model.added["time_ids"].tolist() == [ids[row] for row in rows]
    else:
        assert model.added is None
