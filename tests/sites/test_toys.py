"""ViTs by strangers: every block is found, and every method is right or refused."""

from __future__ import annotations

import pytest
import torch
from survey.pairs import examine
from survey.residual_stream import unproven_mids
from torch import nn

import petune
from tests.tiny import module_beside

toys = module_beside(__file__, "toys")


@pytest.mark.parametrize("name", toys.TOYS)
def test_its_places_are_found(name: str) -> None:
    model = toys.toy(name)
    sites = petune.find_sites(model)
    assert len(sites.blocks) == (1 if name == "shared weights" else toys.DEPTH)
    assert (sites.embed_dim, sites.grid_size) == (toys.D, (4, 4))
    assert (sites.head.path, sites.norm.path) == ("to_classes", "last")
    assert all({"mid", "mlp"} <= block.parts.keys() for block in sites.blocks)
    assert unproven_mids(model, sites) == []


@pytest.mark.parametrize("name", toys.TOYS)
@pytest.mark.parametrize("method", ["linear", "full", "adaptformer:bottleneck=4", "vpt", "vpt:deep=false"])
def test_every_method_is_right(name: str, method: str) -> None:
    outcome = examine(toys.toy(name), method)
    refused = (name, method) == ("ModuleList of pairs", "vpt:deep=false")  # no module passes prompts on
    assert outcome.state == ("refused" if refused else "ok"), outcome.detail


@pytest.mark.filterwarnings("ignore:Toy reads the weights of 3 linear layers")
@pytest.mark.parametrize("name", ["nn.TransformerEncoderLayer", "nn.TransformerEncoderLayer, post-norm"])
def test_lora_is_not_passed_by_the_fused_kernel(name: str) -> None:
    """Torch's layer reads q, k and v's weights itself where nothing is watched; what LoRA trained must be in there."""
    model = toys.toy(name)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(x)
        att = petune.attach(model, "lora", targets="attn")
        for p in att.tuned.values():
            torch.nn.init.normal_(p)
        watched, tuned = model.train()(x), model.eval()(x)
        assert torch.allclose(watched, tuned, atol=1e-5)
        assert not torch.allclose(plain, tuned, atol=1e-2)
        with att.disabled():
            assert torch.equal(model(x), plain)
        att.detach()
        assert torch.equal(model(x), plain)


class Placed(nn.Module):
    """Attention with positions of its own making: petune cannot know them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.SplitAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] / 10)


def test_positions_that_cannot_be_told_are_noticed() -> None:
    """No shape forbids prompts here; only the proof with hidden prompts sees that later tokens are moved."""
    torch.manual_seed(0)
    model = toys.Toy(nn.Sequential(*(toys.Layer(Placed()) for _ in range(2)))).eval()
    assert examine(model, "adaptformer").state == "ok"
    with pytest.raises(petune.PetuneError, match="cannot take prompts: it knows the positions of its tokens"):
        petune.attach(model, "vpt")


@pytest.mark.parametrize("verb", ["train", "before", "after"])
def test_a_block_that_is_no_module_is_not_changed_at_its_ends(verb: str) -> None:
    class Verb(petune.Tuner[petune.TunerConfig]):
        def attach(self, edit: petune.Edit) -> None:
            getattr(edit, verb)(edit.sites.blocks[0], *([] if verb == "train" else [nn.Identity()]))

    model = toys.toy("ModuleList of pairs")
    assert not petune.find_sites(model).blocks[0].is_module
    with pytest.raises(petune.AttachError, match=f"{verb} needs a block that is one module, but block 0"):
        petune.attach(model, Verb())
