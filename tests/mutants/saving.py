"""Bugs in what a run writes, and goes on from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/disk/state": (
        ["tests/unit/finetune/disk/test_checkpoint.py", "tests/properties/disk/test_resume_machine.py"],
        [
            Bug("pack.visit", "id(node) not in seen", "True"),
            Bug("restore_random_state", "torch.set_rng_state(tree['torch'])", "pass"),
            Bug("unpack", "tuple(items) if kind == 'tuple' else items", "items"),
            Bug("_plain", "tensor.detach().cpu().contiguous", "tensor.detach().cpu"),
            Bug("restore_random_state", "random.setstate", "str"),
        ],
    ),
    "finetune/disk/checkpoint": (
        ["tests/unit/finetune/disk/test_checkpoint.py"],
        [
            Bug("save", "paths(folder)[keep:]", "paths(folder)[:keep]"),
            Bug("load", "found['sha256'] != expected['sha256']", "False"),
            Bug(
                "paths",
                "sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True)",
                "sorted(found, reverse=False)",
            ),
            Bug(
                "load",
                "digest != _digest_of(files) or set(files) != {_TENSORS, _STATE}",
                "set(files) != {_TENSORS, _STATE}",
            ),
            Bug("load", "version != FORMAT", "False"),
        ],
    ),
    "finetune/disk/durable": (
        ["tests/unit/finetune/disk/test_checkpoint.py"],
        [
            Bug("folder", "os.rename(aside, path)", "shutil.copytree(aside, path)"),
            Bug("folder", "remove_folder(path)", "pass"),
            Bug("Lines.__init__", "json.loads(line)['step'] <= keep", "json.loads(line)['step'] < keep"),
            Bug("_sound_lines", "line.endswith('}\\n')", "line"),
            Bug("_disk_error", "isinstance(error, OSError) and error.errno in _DISK_ERRORS", "False"),
        ],
    ),
    "finetune/disk/resume": (
        ["tests/unit/finetune/disk/test_resume.py", "tests/unit/finetune/config/test_settings.py"],
        [
            Bug(
                "check_settings",
                "other - FREE - set(_ROUNDING)",
                "other - FREE - set(_ROUNDING) - {'seed'}",
            ),
            Bug("compare", "before != after", "False"),
            Bug("check_settings", "now['dropout'] == 0", "True"),
            Bug("compare", "if split_matters:", "if False:"),
            Bug("check_settings", "changed -= set(_LENGTH)", "changed -= set(_LENGTH) | {'rank'}"),
            Bug("_window", "int(settings['micro_batch']) * int(settings['accumulation'])", "0"),
        ],
    ),
    "finetune/training/stop": (
        ["tests/unit/finetune/training/test_stop.py", "tests/unit/finetune/config/test_settings.py"],
        [
            Bug("Stop._handle", "self.requested = True", "pass"),
            Bug("Stop._handle", "not self._deferring", "self._deferring"),
            Bug("Stop.listening", "signal.signal(number, handler)", "pass"),
            Bug("Stop.deferred", "hook.remove()", "pass"),
            Bug("", "(signal.SIGINT, signal.SIGTERM)", "(signal.SIGINT,)"),
        ],
    ),
    "finetune/disk/run_log": (
        ["tests/unit/finetune/training/test_loop.py", "tests/unit/finetune/disk/test_run_log.py"],
        [
            Bug("RunLog.step", "stats.tokens", "stats.targets"),
            Bug("RunLog._left", "self.total_steps - step", "self.total_steps"),
            Bug(
                "RunLog.__init__",
                "Lines(folder.eval_rows, keep=start_step)",
                "Lines(folder.eval_rows, keep=start_step + 1)",
            ),
            Bug("clock", "round(seconds)", "int(seconds)"),
            Bug(
                "RunLog.step",
                "max(1, self.total_steps // _LINES_WITHOUT_TERMINAL)",
                "self.total_steps // _LINES_WITHOUT_TERMINAL",
            ),
            Bug("RunLog.sync", "self._eval.sync()", "pass"),
            Bug("RunLog.evaluation", "row.loss is not None", "True"),
        ],
    ),
    "finetune/disk/cache": (
        ["tests/unit/finetune/disk/test_cache.py"],
        [
            Bug("cache_folder", "os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'", "Path.home() / '.cache'"),
            Bug("cache_folder", "'FINETUNE_CACHE'", "'XDG_CACHE_HOME'"),
            Bug("cache_folder", "Path.home() / '.cache'", "Path.home()"),
            Bug(
                "cache_folder",
                "Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'finetune'",
                "Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')",
            ),
            Bug("cache_folder", "Path(chosen)", "Path(chosen) / 'finetune'"),
        ],
    ),
    "finetune/disk/run_folder": (
        ["tests/unit/finetune/disk/test_run_folder.py"],
        [
            Bug("RunFolder.trained", "'model' if full else 'adapter'", "'adapter' if full else 'model'"),
            Bug("RunFolder.train_rows", "'train.jsonl'", "'eval.jsonl'"),
            Bug(
                "RunFolder.written",
                "[self.checkpoints, *results, self.tensorboard, self.summary, self.train_rows, self.eval_rows]",
                "[*results, self.tensorboard, self.summary, self.train_rows, self.eval_rows]",
            ),
            Bug(
                "RunFolder.written",
                "[self.trained(full=False), self.trained(full=True), self.merged]",
                "[self.trained(full=False), self.merged]",
            ),
            Bug(
                "RunFolder.written",
                "[self.checkpoints, *results, self.tensorboard, self.summary, self.train_rows, self.eval_rows]",
                "[self.checkpoints, *results, self.tensorboard, self.summary, self.train_rows]",
            ),
        ],
    ),
    "finetune/training/card": (
        ["tests/unit/finetune/training/test_result.py"],
        [
            Bug("model_card", "merged or config.adapter.full", "config.adapter.full"),
            Bug("model_card", "_HUB_NAME.fullmatch", "_HUB_NAME.match"),
            Bug("model_card", "summary.answer_after", "summary.answer_before"),
            Bug("_figures", "summary.held_out_loss_after", "summary.held_out_loss_before"),
            Bug(
                "_use_adapter",
                "f'model={config.model.model!r}, precision={config.model.precision!r}, double_quant={config"
                ".model.double_quant}'",
                "f'model={config.model.model!r}, precision={config.model.precision!r}, double_quant=True'",
            ),
            Bug("_kind", "config.model.precision not in QUANTIZED", "config.model.precision in QUANTIZED"),
            Bug("model_card", "yaml_file.dump(config).rstrip()", "config"),
        ],
    ),
    "finetune/training/result": (
        ["tests/unit/finetune/training/test_result.py"],
        [
            Bug("write_result", "'*.safetensors'", "'*'"),
            Bug(
                "_summarize",
                "(row for row in reversed(evaluations) if row.step == setup.total_steps)",
                "(row for row in reversed(evaluations))",
            ),
            Bug("_summarize", "tokens / seconds", "seconds / tokens"),
            Bug("write_result", "setup.config.adapter.full", "not setup.config.adapter.full"),
            Bug("_sort_targets", "settings['target_modules'].sort()", "pass"),
            Bug("report", "after - before", "before - after"),
            Bug("_summarize", "'targets'", "'tokens'"),
            Bug("_summarize", "first.answer if first else None", "last.answer if last else None"),
            Bug("write_result", "run.merged", "adapter"),
        ],
    ),
    "finetune/model/gguf": (
        ["tests/unit/finetune/model/test_gguf.py"],
        [
            Bug("converted", "f'{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}'", "f'{file.resolve()}'"),
            Bug("converted", "not target.is_dir()", "True"),
            Bug("converted", "fcntl.flock(lock, fcntl.LOCK_EX)", "pass"),
            Bug("_convert", "file.stat().st_size < EXACT_BYTES", "file.stat().st_size > EXACT_BYTES"),
            Bug("converted", "_convert(file, folder)", "_convert(file, target)"),
            Bug("embedded_file", "file is None or not file.is_file()", "file is None"),
            Bug("_convert", "tokenizer.save_pretrained(folder)", "pass"),
        ],
    ),
}
