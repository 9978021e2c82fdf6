"""Unlearn passages in a causal language model, and measure how much of them is left beside an oracle.

A small GPT-2 of bytes learns the help texts of Python and, many times over, passages with secret digits. The texts are
``pydoc_data.topics`` of CPython, PSF License Version 2: nothing is downloaded. The oracle never sees the passages. The
control unlearns like the model beside it, but in random channels.

Exposure (Carlini et al., "The Secret Sharer", USENIX Security 2019, section 4) is log2 |R| - log2 rank, in bits. Here R
is the secret and a random sample of other digits, ranked by the model's loss. It is log2 |R| for a secret that the
model prefers to all others, and 1.4 on average for a model that has never seen it.

    python examples/causal_lm.py                              about two minutes on one CPU core
    torchrun --nproc-per-node 2 examples/causal_lm.py         the same job by two processes, with FSDP2
    python examples/causal_lm.py --fast                       seconds: a model too small to learn much
    python examples/causal_lm.py --json result.json           also writes the numbers
    python examples/causal_lm.py --original original.pt       also keeps the trained model; a later run begins with it
"""

import argparse
import json
import math
import platform
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import delfast
from delfast import causal_lm_loss

LENGTH, DIGITS, BUDGET = 128, 9, 0.3
NAMES = ("Ada", "Boris", "Chiara", "Dmitri", "Elena", "Farid", "Greta", "Hiro")
FULL = {"hidden": 96, "layers": 3, "blocks": 3000, "held_out": 300, "repeats": 40, "epochs": 1, "sample": 512}
FAST = {"hidden": 48, "layers": 2, "blocks": 64, "held_out": 40, "repeats": 24, "epochs": 6, "sample": 64}
Example = dict[str, Tensor]


def example(text: bytes) -> Example:
    """Return a text of at most LENGTH bytes as token ids, one a byte, and their attention mask, padded on the right."""
    ids = torch.zeros(LENGTH, dtype=torch.int64)
    ids[: len(text)] = torch.tensor(list(text))
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < len(text)).long()}


def passages() -> list[tuple[bytes, bytes]]:
    """Return the beginning and the secret digits of each passage."""
    draw = random.Random(7)
    return [(f"The access code of {name} is ".encode(), bytes(draw.choices(b"0123456789", k=DIGITS))) for name in NAMES]


def spread(model: GPT2LMHeadModel, mesh: DeviceMesh | None) -> GPT2LMHeadModel:
    """Shard a model over the processes, block by block; with one process leave it as it is."""
    if mesh is not None:
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict with whole tensors, on every process."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.detach().clone() for name, value in state.items()}


def train(
    model: nn.Module,
    examples: list[Example],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    mesh: DeviceMesh | None,
    rate: float = 3e-3,
) -> None:
    """Run an ordinary training job, which contains nothing about masks. The processes divide each batch."""
    rank, processes = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    loader = DataLoader(examples, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            count = len(batch["input_ids"])
            own = list(range(rank, count, processes))
            # a process without an example computes one that does not count, since the others wait for its pass
            share = {name: value[own or [0]] for name, value in batch.items()}
            # FSDP2 takes the mean of the processes' gradients: that of the batch, also if it does not divide
            (causal_lm_loss(model, share)[: len(own)].sum() * processes / count).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def exposure(model: nn.Module, sample: int) -> float:
    """Return the mean exposure of the secrets in bits, each among ``sample`` strings of digits, itself included."""
    model.eval()
    draw, bits = random.Random(8), []
    for prefix, secret in passages():
        strings = [secret, *(bytes(draw.choices(b"0123456789", k=DIGITS)) for _ in range(sample - 1))]
        losses = causal_lm_loss(model, {"input_ids": torch.tensor([list(prefix + string) for string in strings])})
        bits.append(math.log2(sample) - math.log2(1 + int((losses[1:] < losses[0]).sum())))
    return sum(bits) / len(bits)


def unlearn(
    model: nn.Module,
    forget: list[Example],
    retain: list[Example],
    network: Callable[[], nn.Module],
    strategy: str,
    mesh: DeviceMesh | None,
) -> delfast.Mask:
    """Localize the forget set, reset what was found, and train only this on the retain set; return what was found.

    The head is tied with the embeddings, which do not compete: it stays fixed.
    """
    options = {"loss_fn": causal_lm_loss, "exclude": ["*.wte.*", "*.wpe.*"]}  # without the embeddings, hence the head
    loader = DataLoader(forget, batch_size=4)  # the whole set's, on every process
    mask = delfast.localize(model, loader, BUDGET, strategy=strategy, group=mesh, **options)
    delfast.reset_(model, mask, init=network)
    optimizer = delfast.optim.MaskedAdamW(model.named_parameters(), mask, weight_decay=0.01)
    train(model, retain, optimizer, 1, mesh)
    return mask


def run(settings: dict[str, int], mesh: DeviceMesh | None, path: Path | None) -> dict[str, object]:
    """Train, unlearn and measure; return the numbers. The original is read from ``path`` if this is there."""

    def network() -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=256, n_positions=LENGTH, n_embd=settings["hidden"], n_layer=settings["layers"], n_head=4,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip

    def trained(examples: list[Example]) -> nn.Module:
        torch.manual_seed(0)
        model = spread(network(), mesh)
        train(model, examples, torch.optim.AdamW(model.parameters(), weight_decay=0.01), settings["epochs"], mesh)
        return model

    def loaded(state: dict[str, Tensor]) -> nn.Module:
        model = network()
        model.load_state_dict(state)
        return spread(model, mesh)

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    blocks = [example(text[start : start + LENGTH]) for start in range(0, len(text), LENGTH)]
    random.Random(0).shuffle(blocks)
    held_out, retain = blocks[: settings["held_out"]], blocks[-settings["blocks"] :]
    forget = [example(prefix + secret) for prefix, secret in passages()]

    before = kept(path)
    if before is None:
        before = whole(trained(retain + settings["repeats"] * forget))
        if path is not None and is_first():
            torch.save(before, path)
    models = {name: loaded(before) for name in ("original", "unlearned", "control")}
    mask = unlearn(models["unlearned"], forget, retain, network, "del", mesh)
    unlearn(models["control"], forget, retain, network, "random", mesh)
    models["oracle"] = trained(retain)

    rows, sets = {}, [DataLoader(each, batch_size=50) for each in (forget, retain[: len(held_out)], held_out)]
    for name, model in models.items():
        metrics = delfast.evaluate(model, *sets, mia=False, group=mesh)
        rows[name] = {
            "perplexity": metrics.test_perplexity, "forget_loss": metrics.forget_loss,
            "exposure": exposure(model, settings["sample"]),
        }  # fmt: skip
    flags = mask.to_dense()
    changed = {name: value != before[name] for name, value in whole(models["unlearned"]).items()}
    return {
        "models": rows,
        "changed_outside": sum(int((each & ~flags[n] if n in flags else each).sum()) for n, each in changed.items()),
        "mask": {"selected": mask.selected, "competing": mask.total, "digest": mask.digest},
        "parameters": sum(parameter.numel() for parameter in models["unlearned"].parameters()),
        "settings": {**settings, "budget": BUDGET, "passages": len(NAMES), "text_bytes": len(text)},
        "versions": {"delfast": delfast.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def kept(path: Path | None) -> dict[str, Tensor] | None:
    """Return, on every process, the state dict in the file if the first process finds it; otherwise None."""
    found = [torch.load(path) if path is not None and is_first() and path.exists() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def is_first() -> bool:
    """Return whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Unlearn passages in a causal language model.")
    parser.add_argument("--fast", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--original", type=Path, help="read the trained model from this file, or write it to it")
    arguments = parser.parse_args()
    mesh = None
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    result = run(FAST if arguments.fast else FULL, mesh, arguments.original)
    if is_first():
        print(f"{'model':10}{'held-out perplexity':>22}{'loss of passages':>20}{'exposure, bits':>18}")
        for name, row in result["models"].items():
            print(f"{name:10}{row['perplexity']:22.2f}{row['forget_loss']:20.2f}{row['exposure']:18.2f}")
        print(f"mask: {result['mask']['digest']}")
        print(f"changed outside the mask: {result['changed_outside']}")
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
