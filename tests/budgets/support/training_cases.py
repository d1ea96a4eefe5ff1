"""The table's rows: every setting of the command line that changes what a training step holds, by itself and in pairs.

python training_cases.py           # measures all of them anew and writes training_steps.json
python training_cases.py --fresh   # measures and writes those alone that the table does not have

The rows run the default kernels. These include liger-kernel's, which the `test` extra installs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dry_steps import Case

from finetune.config.settings import AdapterConfig, ModelConfig, OptimizerName, Precision, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

CARD = "rtx-4080"
TABLE = Path(__file__).parents[1] / "training_steps.json"
SLACK = 1.01
"""Budget over measured peak: a step that needs 1% more than it did fails, and so does one that needs 1% less."""
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
PRECISIONS: tuple[str, ...] = get_args(Precision)


def cases() -> dict[str, Case]:
    """Every row by its name."""
    rows: dict[str, Case] = {}
    for precision in PRECISIONS:
        for optimizer in OPTIMIZERS:
            rows[f"{precision} {optimizer}"] = Case(model={"precision": precision}, train={"optimizer": optimizer})
        for name, train in {
            "kept activations": {"checkpointing": False},
            "inputs on the card": {"offload_activations": False},
        }.items():
            rows[f"{precision} {name}"] = Case(model={"precision": precision}, train=train)
        rows[f"{precision} seq 2048"] = Case(model={"precision": precision}, seq=2048)
        rows[f"{precision} micro-batch 4"] = Case(model={"precision": precision}, micro_batch=4)
        if precision != "int8":  # experts are refused in int8
            rows[f"mixtral {precision}"] = Case(shape="mixtral", model={"precision": precision})
    for precision in ("nf4", "fp4"):
        rows[f"{precision} single quantization"] = Case(model={"precision": precision, "double_quant": False})
    for rank in (4, 64, 256):
        for optimizer in OPTIMIZERS:
            rows[f"rank {rank} {optimizer}"] = Case(adapter={"rank": rank}, train={"optimizer": optimizer})
    for precision in ("fp32", "bf16"):
        for optimizer in OPTIMIZERS:
            rows[f"full {precision} {optimizer}"] = Case(
                model={"precision": precision}, adapter={"full": True}, train={"optimizer": optimizer}
            )
    for precision in ("fp32", "bf16", "int8"):
        rows[f"{precision} dora"] = Case(model={"precision": precision}, adapter={"dora": True})
    for name, adapter in {
        "dora": {"dora": True},
        "dora with dropout": {"dora": True, "dropout": 0.1},
        "rslora": {"rslora": True},
        "dropout": {"dropout": 0.1},
        "q and v": {"targets": ("q_proj", "v_proj")},
        "without down_proj": {"exclude": ("down_proj",)},
        "fp32 adapter": {"adapter_dtype": "fp32"},
        "fp16 adapter": {"adapter_dtype": "fp16"},
    }.items():
        rows[f"nf4 {name}"] = Case(adapter=adapter)
        rows[f"nf4 {name}, kept activations"] = Case(adapter=adapter, train={"checkpointing": False})
    rows["nf4 computing in fp32, bf16 adapter"] = Case(
        model={"compute_dtype": "fp32"}, adapter={"adapter_dtype": "bf16"}
    )
    for init in ("gaussian", "orthogonal"):
        rows[f"nf4 {init} start"] = Case(adapter={"init": init})
    for compute in ("bf16", "fp16", "fp32"):
        rows[f"nf4 computing in {compute}"] = Case(model={"compute_dtype": compute})
        rows[f"fp32 computing in {compute}"] = Case(model={"precision": "fp32", "compute_dtype": compute})
    for attention in ("sdpa", "eager"):
        rows[f"nf4 {attention} attention"] = Case(model={"attention": attention}, seq=1024)
    for chunk in (64, 256, 4096):
        rows[f"nf4 loss chunk {chunk}"] = Case(train={"loss_chunk": chunk}, seq=2048)
    rows["nf4 packed"] = Case(packed=True)
    for number in (1, 3):  # of four layers
        rows[f"nf4 {number} recomputed"] = Case(train={"checkpointing": number}, seq=2048)
    rows["nf4 accumulation 4"] = Case(micro_batches=4)
    rows["nf4 resized embeddings"] = Case(model={"resize_embeddings": True})
    rows["nf4 no clip"] = Case(train={"clip": 0.0})
    return rows


def columns(case: Case) -> dict[str, Any]:
    """What a row is of, as the table says it."""
    model, adapter, train = ModelConfig(**case.model), AdapterConfig(**case.adapter), TrainConfig(**case.train)
    return {
        "shape": case.shape,
        "quantization": model.precision + ("" if model.double_quant else ", scales not"),
        "rank": None if adapter.full else adapter.rank,
        "seq": case.seq,
        "batch": f"{case.micro_batches} x {case.micro_batch}",
        "checkpointing": True if train.checkpointing == "auto" else train.checkpointing,  # a step by itself: all layers
        "optimizer": train.optimizer,
    }


def measured(wanted: Iterable[Case], card: str = CARD) -> list[dict[str, Any]]:
    """Figures of the cases, from one process on a dry GPU."""
    script = Path(__file__).with_name("dry_steps.py")
    done = subprocess.run(
        [sys.executable, str(script), card],
        input=json.dumps([asdict(case) for case in wanted]),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,  # a guard against a hang: each of 150 cases takes 2 to 8 seconds on a busy machine
    )
    if done.returncode:
        raise RuntimeError(f"the dry steps failed ({done.returncode}):\n{done.stderr[-4000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Write the table."""
    rows = cases()
    known = json.loads(TABLE.read_text()) if "--fresh" in sys.argv else {}
    wanted = {name: case for name, case in rows.items() if name not in known}
    for name, figures in zip(wanted, measured(wanted.values()), strict=True):
        known[name] = columns(rows[name]) | {
            "budget_bytes": round(max(figures["step_peaks"]) * SLACK),
            "loaded_bytes": figures["loaded_bytes"],
            "managed_bytes": figures["managed_bytes"],
        }
    TABLE.write_text("{\n" + ",\n".join(f" {json.dumps(n)}: {json.dumps(known[n])}" for n in rows) + "\n}\n")
    print(f"{len(wanted)} of {len(rows)} rows measured, in {TABLE}")


if __name__ == "__main__":
    main()
