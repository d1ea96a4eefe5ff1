"""Bugs in arithmetic and measurements of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/estimate/dimensions": (
        ["tests/unit/finetune/estimate/test_arithmetic.py", "tests/properties/estimate/test_dimensions.py"],
        [
            ('(fields.get("num_key_value_heads") or heads) * head', "heads * head"),
            ("return queries + 2 * keys + hidden", "return 2 * queries + 2 * keys"),
            ('norms=4 if family == "gemma2" else 2', "norms=2"),
            ("(1 if self.tied else 2)", "2"),
            (
                "max(part.outputs * part.inputs for part in self.stored_linears)",
                "max(part.elements for part in self.stored_linears)",
            ),
            ('fields.get("head_dim") or hidden // heads', "hidden // heads"),
            ("self.norms * self.layers + 1", "self.norms * self.layers"),
        ],
    ),
    "finetune/estimate/arithmetic": (
        ["tests/unit/finetune/estimate/test_arithmetic.py"],
        [
            ('full = weights["fp32"] + 4 * gb + 2 * 4 * gb', 'full = weights["fp32"] + 4 * gb + 4 * gb'),
            ("NESTED_BLOCK = 256", "NESTED_BLOCK = 64"),
            (
                "[config.adapter.rank * part.inputs, part.outputs * config.adapter.rank]",
                "[config.adapter.rank * part.inputs]",
            ),
            ("PAGED_FROM = 4096", "PAGED_FROM = 100_000"),
            ("return dims.layers * kept + mask, working", "return kept + mask, working"),
            ("max(dequantized, one_gradient)", "dequantized"),
            ("config.data.seq > dims.window", "config.data.seq < dims.window"),
            ("2 * layer[0] * compute", "layer[0] * compute"),
        ],
    ),
    "finetune/disk/host_memory": (
        ["tests/unit/finetune/disk/test_host_memory.py"],
        [
            ("ru_maxrss * 1024", "ru_maxrss"),
            ("int(line.split()[1]) * 1024", "int(line.split()[1]) * 1000"),
            ("return min(limit", "return max(limit"),
            ('_status_bytes("VmHWM") or', '_status_bytes("VmRSS") or'),
            ('("memory.max", "memory/memory.limit_in_bytes")', '("memory/memory.limit_in_bytes",)'),
            ("limits.append(address_space)", "pass"),
            (".malloc_trim(0)", ".malloc_trim"),
        ],
    ),
    "finetune/training/oom": (
        ["tests/unit/finetune/training/test_oom.py"],
        [
            ('now["accumulation"] * now["micro_batch"]', 'now["accumulation"]'),
            ("key=lambda s: -s.saved_bytes", "key=lambda s: s.saved_bytes"),
            (
                '"trained weights" if parameter.requires_grad else "base weights"',
                '"base weights" if parameter.requires_grad else "trained weights"',
            ),
            ("return tensor.nbytes + extra", "return tensor.nbytes"),
            ("0 if on_device else found.managed", "found.managed if on_device else 0"),
            ("if s.saved_bytes > 0", "if s.flags"),
            ("traceback.clear_frames(error.__traceback__)", "pass"),
            ("rest = held - sum(parts.values())", "rest = held"),
        ],
    ),
    "finetune/dryrun/attribution": (
        ["tests/unit/finetune/dryrun/test_attribution.py", "tests/unit/finetune/ladder/test_command.py"],
        [
            ('total -= event["size"]', 'total += event["size"]'),
            ("events[: peak + 1]", "events[:peak]"),
            ("<= freed.get(address, math.inf)", "<= math.inf"),
            ('if any(event["time_us"] <= when', "if any(0 <= when"),
            ('alive.pop(event["addr"], None)', "pass"),
            ('any(frame["filename"] == _LOSS_FILE', 'all(frame["filename"] == _LOSS_FILE'),
        ],
    ),
    "finetune/dryrun/trial": (
        ["tests/unit/finetune/dryrun/test_trial.py"],
        [
            ("managed - self.managed_before", "managed"),
            ("-(-storage.nbytes() // 512) * 512", "storage.nbytes() // 512 * 512"),
            ("if storage.data_ptr() in seen:", "if False:"),
            ("min(config.train.accumulation, MOST_MICRO_BATCHES)", "1"),
            ("steps: int = 2", "steps: int = 1"),
            ("fits=not message", "fits=True"),
            ("driver.reset_peaks()", "pass"),
            ('for name, size in categories.items() if name != "gradients")', "for name, size in categories.items())"),
            ("optimizer.param_groups.clear()", "pass"),
        ],
    ),
    "finetune/dryrun/search": (
        ["tests/unit/finetune/dryrun/test_search.py"],
        [
            ("return trial.fits and trial.peak_device <= limit_bytes", "return trial.fits"),
            (
                'config.train.micro_batch if name == "seq" else config.data.seq',
                'config.data.seq if name == "seq" else config.train.micro_batch',
            ),
            ("config.adapter.rank <= 4", "config.adapter.rank <= 8"),
            ('config = yaml_file.replace(config, {"checkpointing": True})', "pass"),
            ("(low + 1) * step", "(low + 2) * step"),
            ("low, high = 0, most + 1", "low, high = 0, most"),
        ],
    ),
    "finetune/dryrun/command": (
        ["tests/unit/finetune/dryrun/test_main.py", "tests/unit/finetune/dryrun/test_command.py"],
        [
            ("int(total * (1 - MARGIN))", "int(total * (1 + MARGIN))"),
            ('if value == default[name] or sections[name] == "dry":', "if value == default[name]:"),
            ("return ExitCode.OK if outcome.fits else ExitCode.OUT_OF_MEMORY", "return ExitCode.OK"),
            ("map(shlex.quote, words)", "words"),
            ("if is_active() or real_gpu_present():", "if real_gpu_present():"),
            ("found is None or found.best is None", "found is None"),
            ("if trial.fits or card is None:", "if trial.fits or card is not None:"),
            ('kept["device"] = "cuda"', "pass"),
        ],
    ),
    "finetune/dryrun/report": (
        ["tests/unit/finetune/dryrun/test_report.py", "tests/unit/finetune/dryrun/test_command.py"],
        [
            ("self.trial if self.roomy is None else self.roomy", "self.trial"),
            ('"fits": outcome.fits', '"fits": whole.fits'),
            ('"total_bytes": outcome.trial.total', '"total_bytes": whole.total'),
            ("gib(total - outcome.needed)", "gib(outcome.needed - total)"),
            ("ooms=int(not outcome.fits)", "ooms=0"),
            ('return "dry" if trial.dry else "cuda"', 'return "cuda" if trial.dry else "dry"'),
            ("list(dict.fromkeys(note for note in notes", "list(list(note for note in notes"),
            ("sound=outcome.fits", "sound=True"),
        ],
    ),
    "finetune/model/int8": (
        ["tests/properties/model/test_int8_inputs.py"],
        [
            ("type(module) is bnb.nn.Linear8bitLt", "False"),
            ("SCALE = 127", "SCALE = 128"),
            ("x.requires_grad and torch.is_grad_enabled()", "False"),
            ("ctx.layer, ctx.dtype = layer, x.dtype", "ctx.layer, ctx.dtype, ctx.x = layer, x.dtype, x"),
            ("return grad.to(ctx.dtype) @ weight, None", "return grad.to(ctx.dtype) @ (2 * weight), None"),
        ],
    ),
    "finetune/dryrun/recording": (
        ["tests/unit/finetune/dryrun/test_trial_process.py"],
        [
            ("max(0.0, end - seconds)", "end - seconds"),
            ("start=max(0.0, end - seconds), end=end", "start=end, end=end + seconds"),
            ("Peak(allocated_bytes=peak_bytes)", "Peak(reserved_bytes=peak_bytes)"),
            ("self._history.start()", "pass"),
            ("self._recorder.start()", "pass"),
        ],
    ),
    "finetune/dryrun/trial_process": (
        ["tests/unit/finetune/dryrun/test_trial_process.py", "tests/unit/finetune/dryrun/test_command.py"],
        [
            ("tuple(value) if isinstance(value, list) else", ""),
            ("Path(value) if types[name][1] is Path else", ""),
            ("if bench.refused is not None:", "if False:"),
            ("open_settings=request.open_settings", "open_settings=()"),
            ("if request.over_time:", "if False:"),
            ("[yaml_file.replace(config, from_plain(change)) for", "[config for"),
            ("limit_bytes=request.limit_bytes", "limit_bytes=2 * request.limit_bytes"),
        ],
    ),
    "finetune/dryrun/messages": (
        ["tests/unit/finetune/dryrun/test_messages.py", "tests/unit/finetune/dryrun/test_search.py"],
        [
            ("return self.micro_batch * self.seq", "return self.micro_batch"),
            ('("micro_batch", "seq", "checkpointing", "rank")', '("micro_batch", "seq", "rank")'),
            ("host_reads: tuple[HostRead, ...] = ()", "host_reads: Any = ()"),
            ("recording: Recording | None = None", "recording: Any = None"),
            ("next: Candidate | None = None", "next: Any = None"),
        ],
    ),
    "finetune/ladder/results": (
        ["tests/unit/finetune/ladder/test_command.py"],
        [
            ("sum(self.measured.values())", "sum(self.arithmetic.values())"),
            ("sum(self.arithmetic.values())", "sum(self.measured.values())"),
            ('tuple(Rung(**rung) for rung in fields["rungs"])', 'tuple(fields["rungs"])'),
            ("dataclasses.asdict(ladder)", "dataclasses.asdict(ladder.rungs[0])"),
            ("json.loads(text)", "{}"),
        ],
    ),
    "finetune/ladder/command": (
        ["tests/unit/finetune/ladder/test_command.py", "tests/unit/finetune/ladder/test_results.py"],
        [
            ("fits = trial.peak_device <= card.total_bytes", "fits = trial.peak_allocated <= card.total_bytes"),
            ("max(0, trial.peak_device - sum(measured.values()))", "trial.peak_device"),
            ('measured["context"] = trial.context', "pass"),
            (
                '"+ double quantization": _NF4 | {"double_quant": True}',
                '"+ double quantization": _NF4 | {"double_quant": False}',
            ),
            ("share = rung.needed / ladder.total_bytes", "share = rung.expected / ladder.total_bytes"),
            (
                '("full", "optimizer", "checkpointing", "accumulation")',
                '("optimizer", "checkpointing", "accumulation")',
            ),
            ("card.name, total_bytes=ROOMY_BYTES)", "card.name)"),
        ],
    ),
    "finetune/ladder/drawing": (
        ["tests/unit/finetune/ladder/test_command.py", "tests/unit/finetune/ladder/test_results.py"],
        [
            ("left += size / GIB", "left = size / GIB"),
            ("card = ladder.total_bytes / GIB\n    for", "card = ladder.total_bytes / 1e9\n    for"),
            ("rung.arithmetic, hatched=True", "rung.measured, hatched=True"),
            ('return "  fits" if rung.fits else', 'return "  fits" if not rung.fits else'),
            ('{"Date": None} if file.suffix', "{} if file.suffix"),
            ('"svg.hashsalt": "ladder", ', ""),
        ],
    ),
}
