"""Train a small GPT on the tokens of a dataset.  Killed at any moment and started again, it draws the same loss curve.

    bsq demo
    python examples/train_lm.py demo/tokens runs/lm

Each token of L bits becomes several ids, one for each group of bits, so that the vocabulary stays small; images and
clips are packed into rows of equal length.  RUN/checkpoint.pt holds model, optimizer and where the loader is, in one
file that is replaced in one step; RUN/losses.jsonl has a line for each step."""

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Pack, SequenceFormat, TokenDataset, TokenLoader


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor, mask_B1NN: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x_BND)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1NN)
        x_BND = x_BND + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BND + self.mlp(self.norm_2(x_BND))


class GPT(nn.Module):
    def __init__(self, num_ids: int, num_positions: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.ids, self.positions = nn.Embedding(num_ids, width), nn.Embedding(num_positions, width)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_ids, bias=False)
        self.head.weight = self.ids.weight
        nn.init.normal_(self.ids.weight, std=0.02)

    def forward(self, ids_BN: Tensor, positions_BN: Tensor) -> Tensor:
        # A position of 0 begins a segment of the pack; nothing looks into another segment, or ahead.
        segments_BN = (positions_BN == 0).cumsum(1)
        mask_BNN = (segments_BN[:, :, None] == segments_BN[:, None, :]).tril()
        x_BND = self.ids(ids_BN) + self.positions(positions_BN)
        for block in self.blocks:
            x_BND = block(x_BND, mask_BNN[:, None])
        return self.head(self.norm(x_BND))


def loss_of(model: GPT, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy in nats of the ids that count."""
    logits = model(batch["ids"], batch["position_ids"])[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")
    counts = batch["loss_mask"][:, 1:].flatten()
    return losses[counts].mean()


def save(path: Path, state: dict) -> None:
    """Replace the checkpoint in one step: whoever kills us leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--batch", type=int, default=8, help="packs in a step")
    parser.add_argument("--seq-len", type=int, default=1028)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    dataset = TokenDataset(options.dataset)
    info = dataset.info
    groups = info.bits // info.group_size
    num_codes = 1 << info.group_size
    form = SequenceFormat(
        group_bits=(info.group_size,) * groups,
        id_offset=tuple(num_codes * group for group in range(groups)),
        boi=num_codes * groups,
        eoi=num_codes * groups + 1,
    )
    loader = TokenLoader(
        dataset,
        options.batch,
        seed=options.seed,
        format=form,
        pack=Pack(seq_len=options.seq_len, lanes=4, split=True),
        repeat=True,
    )

    torch.manual_seed(options.seed)
    model = GPT(form.num_ids(info.bits), options.seq_len, options.width, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))

    options.run.mkdir(parents=True, exist_ok=True)
    checkpoint, log = options.run / "checkpoint.pt", options.run / "losses.jsonl"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        loader.load_state_dict(json.loads(state["loader"]))
        step = state["step"]
        print(f"going on behind step {step}")
    # The log may be ahead of the checkpoint; those steps are taken again.
    lines = log.read_text().splitlines()[:step] if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines))

    with log.open("a") as losses:
        for batch in loader:
            if step >= options.steps:
                break
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            losses.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
            losses.flush()
            if step % options.save_every == 0 or step == options.steps:
                # The state that goes on behind this batch; what the loader has prepared since does not count.
                state = {"step": step, "loader": json.dumps(batch["state"])}
                parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
                save(checkpoint, state | {name: part.state_dict() for name, part in parts.items()})
                print(f"step {step}: {groups * loss.item() / math.log(2):.2f} bits for each token of {info.bits}")


if __name__ == "__main__":
    main()
