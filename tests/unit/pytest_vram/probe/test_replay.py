"""Memory history and marks, replayed: what each allocation is for, and the curve that is left of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from pytest_vram.probe.program_events import Marks, module_group
from pytest_vram.probe.replay import Block, Replay, holders, module_of, replay, timeline

if TYPE_CHECKING:
    from pytest_vram.memory import Timeline

KB = 1024


class Program:
    """Writes a history and marks, a microsecond apart."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.marks = Marks()
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def alloc(self, addr: int, size: int, line: int = 0, name: str = "step", file: str = "/home/me/train.py") -> None:
        frames = [{"filename": file, "line": line, "name": name}] if line else []
        self.events.append({"action": "alloc", "addr": addr, "size": size, "time_us": self.tick(), "frames": frames})

    def free(self, addr: int) -> None:
        for action in ("free_requested", "free_completed"):
            self.events.append({"action": action, "addr": addr, "size": 0, "time_us": self.tick()})

    def mark(self, kind: str, module: str = "", *, head: bool = False) -> None:
        self.marks.steps.append((self.tick() * 1000, kind, module, head))

    def label(self, addr: int, category: Any, module: str = "") -> None:
        self.marks.labels.append((self.tick() * 1000, 0, addr, category, module))

    def replay(self) -> Replay:
        return replay(self.events, [], self.marks, 0)

    def blocks(self) -> list[Block]:
        return list(self.replay().blocks)

    def timeline(self, points: int = 240) -> Timeline:
        return timeline(self.replay(), start_us=0, reserved_before=0, points=points)


def training_step() -> Program:
    p = Program()
    p.alloc(1, 100 * KB, line=1)  # weights
    p.alloc(2, 10 * KB, line=2)  # the batch
    p.mark("enter", "Model")
    p.label(1, "weights", "mlp")
    p.mark("enter", "layers.0.mlp")
    p.alloc(3, 30 * KB, line=3)  # saved for backward
    p.alloc(4, 7 * KB, line=3)
    p.free(4)  # temporary
    p.mark("leave")
    p.mark("enter", "lm_head", head=True)
    p.alloc(5, 50 * KB, line=4)
    p.mark("leave")
    p.alloc(6, 51 * KB, line=5)  # the loss, within the model
    p.mark("leave")
    p.mark("backward")
    p.alloc(7, 60 * KB)
    p.mark("enter", "layers.0.mlp")  # recomputed
    p.alloc(8, 8 * KB, line=3)
    p.mark("leave")
    p.alloc(9, 100 * KB)
    p.label(9, "gradients", "mlp")
    for addr in (7, 8, 3, 5, 6):
        p.free(addr)
    p.mark("end")
    p.mark("optimizer")
    p.alloc(10, 150 * KB, line=6)
    p.alloc(11, 3 * KB, line=6)
    p.free(11)
    p.mark("end")
    p.label(10, "optimizer")
    p.free(9)
    return p


def test_every_allocation_of_a_step_is_what_it_is_for() -> None:
    found = [(block.size // KB, block.category) for block in training_step().blocks()]
    assert found == [
        (100, "weights"),
        (10, "other"),
        (30, "activations"),
        (7, "temporary"),
        (50, "logits"),
        (51, "logits"),
        (60, "temporary"),
        (8, "activations"),
        (100, "gradients"),
        (150, "optimizer"),
        (3, "temporary"),
    ]


def test_what_outlives_the_backward_pass_was_not_saved_for_it() -> None:
    p = Program()
    p.mark("enter", "Model")
    p.alloc(1, KB)
    p.mark("leave")
    p.mark("backward")
    p.mark("end")
    assert [block.category for block in p.blocks()] == ["other"]


def test_a_loss_outside_the_model_is_logits_by_its_name() -> None:
    p = Program()
    p.mark("enter", "Model")
    p.mark("leave")
    p.alloc(1, KB, line=9, name="chunked_cross_entropy")
    p.alloc(2, KB, line=9, name="step", file="/home/me/loss.py")
    p.alloc(3, KB, line=9, name="step")
    assert [block.category for block in p.blocks()] == ["logits", "logits", "other"]


def test_a_loss_function_that_calls_the_model_does_not_make_all_of_it_logits() -> None:
    """transformers' ``Trainer.compute_loss``, for one."""
    p = Program()
    for name, file in (("forward", "/home/me/model.py"), ("cross_entropy", "/site/torch/nn/functional.py")):
        p.mark("enter", "Model")
        p.alloc(len(p.events), KB, line=1, name=name, file=file)
        p.events[-1]["frames"] += [
            {"filename": "/site/torch/nn/modules/module.py", "line": 2, "name": "_call_impl"},
            {"filename": "/site/transformers/trainer.py", "line": 3, "name": "compute_loss"},
        ]
        p.mark("leave")
    assert [block.category for block in p.blocks()] == ["activations", "logits"]


def test_a_module_left_by_an_exception_does_not_stay_open() -> None:
    p = Program()
    p.mark("enter", "Model")
    p.mark("optimizer")
    p.mark("end")
    p.alloc(1, KB, line=1)
    (block,) = p.blocks()
    assert (block.category, block.module) == ("other", "")


def test_weights_that_were_there_before_are_labelled_and_counted() -> None:
    segment = {
        "address": 5,
        "total_size": 4 * KB,
        "blocks": [{"size": 4 * KB, "state": "active_allocated", "address": 5}],
    }
    p = Program()
    p.label(5, "weights", "model.layers.0.mlp")
    p.alloc(9, KB)
    played = replay(p.events, [segment], p.marks, 0)
    made = timeline(played, start_us=0, reserved_before=4 * KB)
    assert made.allocated == (4 * KB, 5 * KB)
    assert made.reserved == (4 * KB, 4 * KB)
    assert made.at_peak() == {"weights": 4 * KB, "other": KB}
    assert holders(played, 1)[0].location == "held before the test"


def test_holders_name_line_category_and_module_largest_first() -> None:
    p = training_step()
    found = holders(p.replay(), 3)
    # At the peak, when the gradient has come: weights and gradient, what was saved, logits, and the batch.
    assert [(h.size_bytes // KB, h.category, h.module) for h in found] == [
        (100, "weights", "mlp"),
        (100, "gradients", "mlp"),
        (60, "temporary", None),
    ]
    assert found[0].location == "/home/me/train.py:1 in step"


def test_labels_of_another_device_are_not_taken() -> None:
    p = Program()
    p.alloc(1, KB)
    p.marks.labels.append((p.tick() * 1000, 1, 1, "weights", ""))
    assert [block.category for block in p.blocks()] == ["other"]


def test_layers_of_one_kind_are_one_group() -> None:
    group = module_group
    assert group("base_model.model.model.layers.13.self_attn.q_proj.lora_A.default") == "model.layers.*.self_attn"
    assert group("model.layers.2") == "model.layers.*"
    assert group("lm_head") == "lm_head"
    assert group("17") == group("3.attention") == "model[*]"
    assert group("module.model.embed_tokens") == "model.embed_tokens"
    assert module_of(Block(size=1, born=0)) == "outside modules"


MOVES = st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 50 * KB)), max_size=120)


@given(MOVES, st.integers(3, 30), st.data())
def test_parts_add_up_to_the_whole_and_the_peak_is_kept(moves: Any, points: int, data: Any) -> None:
    p, live, total, most = Program(), {}, 0, 0
    for wants, slot, size in moves:
        kind = data.draw(st.sampled_from(["", "enter", "leave", "backward", "optimizer", "end"]))
        if kind:
            p.mark(kind, "layers.1.mlp" if kind == "enter" else "", head=data.draw(st.booleans()))
        if wants and slot not in live:
            live[slot] = -(-size // 512) * 512
            p.alloc(slot + 1, size)
            total += live[slot]
        elif not wants and slot in live:
            total -= live.pop(slot)
            p.free(slot + 1)
        most = max(most, total)
    made = p.timeline(points)
    assert made.peak_bytes == most
    assert made.allocated[-1] == total
    assert len(made.times) <= points + 3
    assert list(made.times) == sorted(made.times)
    for parts in (made.categories, made.modules):
        sums = [sum(sizes) for sizes in zip(*(series.sizes for series in parts), strict=True)]
        assert tuple(sums) == made.allocated or not any(made.allocated)
    assert sum(h.size_bytes for h in holders(p.replay(), 1000)) == most
