"""Bugs in estimates, in dry runs and in the ladder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/estimate/dimensions": (
        ["tests/unit/finetune/estimate/test_arithmetic.py", "tests/properties/estimate/test_dimensions.py"],
        [
            Bug("Dimensions.of", "fields.get('num_key_value_heads') or heads", "heads"),
            Bug("_biases", "queries + 2 * keys + hidden", "2 * queries + 2 * keys"),
            Bug("Dimensions.of", "4 if family == 'gemma2' else 2", "2"),
            Bug("Dimensions.tensors", "1 if self.tied else 2", "2"),
            Bug("Dimensions.largest_matrix", "part.outputs * part.inputs", "part.elements"),
            Bug("Dimensions.of", "fields.get('head_dim') or hidden // heads", "hidden // heads"),
            Bug("Dimensions.tensors", "self.norms * self.layers + 1", "self.norms * self.layers"),
        ],
    ),
    "finetune/estimate/arithmetic": (
        ["tests/unit/finetune/estimate/test_arithmetic.py"],
        [
            Bug("article_figures", "2 * 4 * gb", "4 * gb"),
            Bug("", "NESTED_BLOCK = 256", "NESTED_BLOCK = 64"),
            Bug(
                "trained_tensors",
                "[config.adapter.rank * part.inputs, part.outputs * config.adapter.rank]",
                "[config.adapter.rank * part.inputs]",
            ),
            Bug("", "PAGED_FROM = 4096", "PAGED_FROM = 100000"),
            Bug("loading_bytes", "2 * layer[0]", "layer[0]"),
            Bug("loading_bytes", "2 * layer[0]", "3 * layer[0]"),
        ],
    ),
    "finetune/estimate/choice": (
        ["tests/unit/finetune/estimate/test_choice.py"],
        [
            Bug("micro_batches", "rows % size == 0", "True"),
            Bug(
                "_Search.by_forecast",
                "extra = max(extra, budget - forecast.needed(fastest)) + FIRST_MARGIN * budget",
                "pass",
            ),
            Bug("Choice.at_least", "self.recomputed <= other.recomputed", "True"),
            Bug("choices", "costs and train.offload_activations == 'auto'", "costs"),
            Bug("choices", "costs and train.offload_activations == 'auto'", "False"),
            Bug("_Search.by_trials", "high = middle", "low = middle"),
            Bug("choices", "reverse=True", "reverse=False"),
        ],
    ),
    "finetune/estimate/sharding": (
        ["tests/unit/finetune/estimate/test_sharding.py"],
        [
            Bug("bytes_elsewhere", "_GATHERED * in_layers / Dimensions.of(shape).layers", "0"),
            Bug("bytes_elsewhere", "found.weights + found.gradients + found.optimizer + updating", "found.weights"),
            Bug("bytes_elsewhere", "1 - kept", "1"),
            Bug("bytes_elsewhere", "0 if config.model.offload_base else 1 / ranks", "1 / ranks"),
            Bug("bytes_elsewhere", "('loading', 'update')", "()"),
            Bug("bytes_elsewhere", "found.temporary if found.moment == 'update' else 0", "0"),
        ],
    ),
    "finetune/estimate/step_time": (
        ["tests/unit/finetune/estimate/test_step_time.py"],
        [
            Bug("_operations", "2 + share + full", "2 + full"),
            Bug("_operations", "_left_out(dims, config) * share", "0"),
            Bug("_bytes", "runs_kernels(config)", "False"),
            Bug("step_time", "-(-config.train.accumulation // ranks)", "config.train.accumulation"),
            Bug(
                "StepTime.seconds",
                "max(self.products + self.attention + self.memory, self.launches)",
                "self.products + self.attention + self.memory",
            ),
            Bug("_kernels", "recomputed * _AGAIN", "_AGAIN"),
            Bug("step_time", "recomputed - 1", "recomputed"),
            Bug("step_time", "copied - forward", "copied"),
            Bug("_operations", "1 + 2.5 + share", "0"),
        ],
    ),
    "finetune/estimate/card_speed": (
        ["tests/unit/finetune/estimate/test_step_time.py"],
        [
            Bug("speed_of", "clocks * per_clock", "clocks * 512"),
            Bug("speed_of", "card.product == product", "False"),
            Bug("speed_of", "card.capability == capability", "True"),
            Bug("_bandwidth", "card.memory_clock_mhz", "card.clock_mhz"),
        ],
    ),
    "finetune/dryrun/full_rows": (
        ["tests/unit/finetune/dryrun/test_full_rows.py"],
        [
            Bug("FullRows.batch", "len(sequences)", "1"),
            Bug("FullRows.sequence_lengths", "self.count", "1"),
            Bug("FullRows.batch", "labels.masked_fill(positions == 0, IGNORED)", "labels"),
            Bug("FullRows.batch", "1 < self.packed <= self.tokens", "False"),
        ],
    ),
    "finetune/config/recompute": (
        ["tests/unit/finetune/config/test_recompute.py"],
        [
            Bug("layers_recomputed", "layers if setting else 0", "layers"),
            Bug("layers_recomputed", "min(setting, layers)", "setting"),
            Bug("expanded", "[FLAG, 'none']", "[FLAG, 'all']"),
            Bug("_checked", "found.lstrip('-').isdecimal()", "True"),
            Bug("spelled", "isinstance(setting, bool)", "False"),
            Bug("inputs_on_host", "device != 'cpu' and (not sharded)", "device != 'cpu'"),
            Bug("_checked_place", "value.lower()", "value"),
        ],
    ),
    "finetune/estimate/activations": (
        ["tests/unit/finetune/estimate/test_arithmetic.py"],
        [
            Bug("activation_bytes", "(dims.layers - recomputed) * kept", "kept"),
            Bug("activation_bytes", "max(dequantized, one_gradient)", "dequantized"),
            Bug("_windowed", "config.data.seq > dims.window", "config.data.seq < dims.window"),
            Bug("layer_bytes", "2 if liger_gates(dims, config) else 3", "3"),
            Bug("runs_kernels", "config.train.kernels == 'torch' or config.model.device == 'cpu'", "False"),
        ],
    ),
    "finetune/dryrun/trial": (
        ["tests/unit/finetune/dryrun/test_trial.py"],
        [
            Bug("Bench._result", "managed - self.managed_before", "managed"),
            Bug("Bench._run", "step == steps - 1", "step == 0"),
            Bug("Bench._recorded_step", "recorder.at_peak(peak)", "{}"),
            Bug("Bench._window", "ranks.share(range(config.train.accumulation))[:MOST_MICRO_BATCHES]", "range(1)"),
            Bug(
                "Bench.run",
                "self, config: RunConfig, *, steps: int=2, attributed: bool=True",
                "self, config: RunConfig, *, steps: int=1, attributed: bool=True",
            ),
            Bug("Bench._result", "not message", "True"),
            Bug("Bench._forget_peaks", "driver.reset_peaks()", "pass"),
            Bug("Bench._clean", "optimizer.param_groups.clear()", "pass"),
        ],
    ),
    "finetune/config/cards": (
        ["tests/unit/finetune/config/test_shard_setting.py"],
        [
            Bug("dry_ranks", "config.dry.count is None", "True"),
            Bug("count_problems", "1 <= count <= MOST", "True"),
            Bug("count_problems", "dry_ranks(config) == 1", "False"),
            Bug("count_problems", "config.train.accumulation < count <= MOST", "False"),
            Bug("count_problems", "count is not None and wet", "False"),
        ],
    ),
    "finetune/dryrun/several": (
        ["tests/unit/finetune/dryrun/test_several.py"],
        [
            Bug("_places", "count == 1", "False"),
            Bug("combined", "refused is not None", "False"),
            Bug("combined", "len(there) < len(results) and (not out_of_memory)", "False"),
            Bug("combined", "found=there[0].found", "found=None"),
            Bug("worst", "not trial.fits", "trial.fits"),
        ],
    ),
    "finetune/dryrun/rank_bench": (
        ["tests/unit/finetune/dryrun/test_several.py"],
        [
            Bug("RankBench.run", "not own.fits", "False"),
            Bug("RankBench.run", "host_reads=()", "host_reads=own.host_reads"),
        ],
    ),
    "finetune/dryrun/search": (
        ["tests/unit/finetune/dryrun/test_search.py"],
        [
            Bug("_Level.attempt", "trial.fits and needed <= self.budget", "trial.fits"),
            Bug("_Level.attempt", "self._refused.append(choice)", "pass"),
            Bug(
                "_Level.__init__",
                "micro_batches(train.micro_batch * train.accumulation, processes=ranks)",
                "micro_batches(train.micro_batch * train.accumulation, processes=1)",
            ),
            Bug("_leaner", "config.adapter.rank // 2 >= LEAST_RANK", "config.adapter.rank // 2 > LEAST_RANK"),
            Bug("_leaner", "config.data.seq // 2 >= LEAST_SEQ", "config.data.seq >= LEAST_SEQ * 8"),
            Bug("search", "level.hopeless()", "False"),
            Bug("_Level.others", "able - {best}", "able"),
            Bug("_Level.candidate", "choice.micro_batch * choice.accumulation", "choice.micro_batch"),
        ],
    ),
    "finetune/dryrun/command": (
        ["tests/unit/finetune/dryrun/test_main.py", "tests/unit/finetune/dryrun/test_command.py"],
        [
            Bug("_fit", "1 - MARGIN", "1 + MARGIN"),
            Bug("command", "value != default[name] and sections[name] != 'dry'", "value != default[name]"),
            Bug("main", "ExitCode.OK if outcome.fits else ExitCode.OUT_OF_MEMORY", "ExitCode.OK"),
            Bug("_card", "is_active() or real_gpu_present()", "real_gpu_present()"),
            Bug("_searched", "found is None or found.best is None", "found is None"),
            Bug("_searched", "confirmed.fits and confirmed.peak_device <= limit", "confirmed.fits"),
            Bug(
                "measure",
                "trials(config, [{}], card, over_time=over_time and (not opened), choose=opened)",
                "trials(config, [{}], card, over_time=over_time, choose=opened)",
            ),
            Bug("measure", "Outcome(trial=trial).chosen_from(config)", "config"),
            Bug("measure", "card is None", "card is not None"),
            Bug("trial_settings", "kept | {'device': 'cuda'}", "kept"),
            Bug("_card", "named_card(config.dry.gpu).name", "config.dry.gpu"),
        ],
    ),
    "finetune/dryrun/report": (
        ["tests/unit/finetune/dryrun/test_report.py", "tests/unit/finetune/dryrun/test_command.py"],
        [
            Bug("Outcome.whole", "self.trial if self.roomy is None else self.roomy", "self.trial"),
            Bug("as_json", "outcome.fits", "whole.fits"),
            Bug("as_json", "outcome.trial.total", "whole.total"),
            Bug("render", "total - outcome.needed", "outcome.needed - total"),
            Bug("_measurement", "int(not outcome.fits)", "0"),
            Bug("_kind", "'dry' if trial.dry else 'cuda'", "'cuda' if trial.dry else 'dry'"),
            Bug("as_report", "outcome.fits", "True"),
        ],
    ),
    "finetune/dryrun/assumptions": (
        ["tests/unit/finetune/dryrun/test_assumptions.py", "tests/unit/finetune/dryrun/test_report.py"],
        [
            Bug("lines", "dict.fromkeys", "list"),
            Bug("lines", "bounds.straddles(trial.total)", "not bounds.straddles(trial.total)"),
            Bug("spread", "trial.context", "0"),
            Bug("collect", "driver.is_active()", "False"),
            Bug("lines", "' taken as ' in note", "True"),
        ],
    ),
    "finetune/dryrun/recording": (
        [
            "tests/unit/finetune/dryrun/test_trial_process.py",
            "tests/unit/finetune/dryrun/test_recording.py",
            "tests/unit/finetune/dryrun/test_trial.py",
        ],
        [
            Bug("TrialRecorder.phase", "max(0.0, end - seconds)", "end - seconds"),
            Bug(
                "TrialRecorder.phase",
                "Phase(name=name, start=max(0.0, end - seconds), end=end, peak=peak)",
                "Phase(name=name, start=end, end=end + seconds, peak=peak)",
            ),
            Bug("TrialRecorder.phase", "allocated_bytes=peak_bytes", "reserved_bytes=peak_bytes"),
            Bug("TrialRecorder.__init__", "self._history.start()", "pass"),
            Bug("TrialRecorder.__init__", "self._recorder.start()", "pass"),
            Bug("by_category", "found.get(name, 0)", "found[name]"),
            Bug("by_category", "peak_bytes - sum(sizes.values())", "0"),
            Bug("StepRecorder.__enter__", "self._recorder.meet(self._model)", "pass"),
        ],
    ),
    "finetune/dryrun/trial_process": (
        ["tests/unit/finetune/dryrun/test_trial_process.py", "tests/unit/finetune/dryrun/test_command.py"],
        [
            Bug(
                "from_plain",
                "tuple(value) if isinstance(value, list) else Path(value) if types[name][1] is Path else value",
                "Path(value) if types[name][1] is Path else value",
            ),
            Bug("from_plain", "Path(value) if types[name][1] is Path else value", "value"),
            Bug("_answer", "bench.refused is not None", "False"),
            Bug("_answer", "request.open_settings", "()"),
            Bug("_answer", "request.over_time", "False"),
            Bug("_answer", "bench.run_chosen if request.choose else bench.run", "bench.run"),
            Bug("_answer", "yaml_file.replace(config, from_plain(change))", "config"),
            Bug("_answer", "request.limit_bytes", "2 * request.limit_bytes"),
        ],
    ),
    "finetune/dryrun/messages": (
        ["tests/unit/finetune/dryrun/test_messages.py", "tests/unit/finetune/dryrun/test_search.py"],
        [
            Bug("Trial", "tuple[HostRead, ...]", "Any"),
            Bug("Trial", "Recording | None", "Any"),
            Bug("Found", "tuple[Candidate, ...]", "Any"),
        ],
    ),
    "finetune/ladder/results": (
        ["tests/unit/finetune/ladder/test_command.py"],
        [
            Bug("Rung.needed", "self.measured", "self.arithmetic"),
            Bug("Rung.expected", "self.arithmetic", "self.measured"),
            Bug("as_json", "ladder", "ladder.rungs[0]"),
        ],
    ),
    "finetune/ladder/command": (
        ["tests/unit/finetune/ladder/test_command.py", "tests/unit/finetune/ladder/test_results.py"],
        [
            Bug("measure", "trial.peak_device", "trial.peak_allocated"),
            Bug("_rung", "max(0, trial.peak_device - sum(measured.values()))", "trial.peak_device"),
            Bug("_rung", "measured['context'] = trial.context", "pass"),
            Bug("", "{'double_quant': True}", "{'double_quant': False}"),
            Bug("_verdict", "rung.needed", "rung.expected"),
            Bug(
                "_step_settings",
                "('full', *_PLAIN)",
                "(*_PLAIN,)",
            ),
            Bug(
                "measure",
                "trials(configs[names[0]], changes, card.name, total_bytes=ROOMY_BYTES)",
                "trials(configs[names[0]], changes, card.name)",
            ),
        ],
    ),
    "finetune/ladder/drawing": (
        ["tests/unit/finetune/ladder/test_command.py", "tests/unit/finetune/ladder/test_results.py"],
        [
            Bug("_bar", "left += size / GIB", "left = size / GIB"),
            Bug("_bars", "ladder.total_bytes / GIB", "ladder.total_bytes / 1000000000.0"),
            Bug("_bars", "rung.arithmetic", "rung.measured"),
            Bug("_note", "rung.fits", "not rung.fits"),
            Bug("draw", "{'Date': None}", "{}"),
            Bug(
                "draw",
                "{'font.size': 10, 'svg.hashsalt': 'ladder', 'svg.fonttype': 'none'}",
                "{'font.size': 10, 'svg.fonttype': 'none'}",
            ),
        ],
    ),
}
