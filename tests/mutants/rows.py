"""Bugs in what becomes of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/data/rows": (
        ["tests/properties/data/test_data_order.py"],
        [
            ("enumerate(lines, start=1)", "enumerate(lines)"),
            ('odd = "" in fields or None in fields.values()', "odd = False"),
            ("line = reader.line_num + 1", "line = line + 1"),
            ("{facts.st_size}:{facts.st_mtime_ns}", ""),
            ('return f"; did you mean', 'return f"; perhaps'),
            ('number += 1\n                yield Row(source=f"{path}:row', 'yield Row(source=f"{path}:row'),
        ],
    ),
    "finetune/data/encode": (
        ["tests/properties/data/test_data_encoding.py"],
        [
            ("learned_up_to[ends] > learned_up_to[offsets[:, 0]]", "learned_up_to[offsets[:, 0] + 0] > 0"),
            ("labels[: config.seq], cut=cut", "labels[-config.seq :], cut=cut"),
            ("cut = max(0, len(ids) - config.seq)", "cut = int(len(ids) > config.seq)"),
            ("(labels[1:] != IGNORED)", "(labels != IGNORED)"),
            ("yield Part(text=whole[place:], learned=False)", "yield Part(text=whole[place:], learned=True)"),
            ('completion + (tokenizer.eos_token or "")', "completion"),
        ],
    ),
    "finetune/data/tokens": (
        ["tests/properties/data/test_data_order.py"],
        [
            ("tally.digest.update(coded.labels.tobytes())", "pass"),
            ("tally.truncated += coded.cut > 0", "tally.truncated += coded.cut"),
            ("        source,\n        config.seq,", "        config.seq,"),
            ("if not config.skip_bad_rows:", "if config.skip_bad_rows:"),
            ("shutil.rmtree(aside, ignore_errors=True)", "pass"),
            ("if not learned:", "if False:"),
        ],
    ),
    "finetune/data/packing": (
        ["tests/properties/data/test_data_order.py"],
        [
            ("if left >= length", "if left > length"),
            ("free[place] -= length", "free[place] -= length - 1"),
            ("done.append(held.pop(fullest))", "held.pop(fullest)"),
            ("default_rng([_PACKING, seed])", "default_rng()"),
            ("[0, *(len(rows) for rows in packed[:-1])]", "[0, *(len(rows) for rows in packed[1:])]"),
        ],
    ),
    "finetune/data/batches": (
        ["tests/properties/data/test_data_order.py"],
        [
            ("labels[line, begin] = IGNORED", "pass"),
            ("positions[line, begin:] = torch.arange(width - begin)\n            begin = end", "begin = end"),
            ("order[number * size : (number + 1) * size]", "order[number * size : (number + 1) * size - 1]"),
            ("default_rng([_ORDER, config.seed, epoch])", "default_rng([_ORDER, config.seed])"),
            ("np.setdiff1d(index, held)", "index"),
            ("range(start_step, total_steps(train, config))", "range(total_steps(train, config))"),
        ],
    ),
    "finetune/training/sample": (
        ["tests/properties/training/test_sample.py"],
        [
            ("input_ids[:first]", "input_ids[: first + 1]"),
            ("min(prompts, key=len)", "max(prompts, key=len)"),
            ("add_generation_prompt=True", "add_generation_prompt=False"),
            ("add_special_tokens=False", "add_special_tokens=True"),
            ("out[0, ids.shape[1] :]", "out[0]"),
            ("model.train(was_training)", "model.train()"),
            ("do_sample=False", "do_sample=True"),
            ("if config.answer_tokens == 0:", "if False:"),
            ("[-_SHOWN:]", "[:_SHOWN]"),
        ],
    ),
}
