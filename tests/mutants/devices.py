"""Bugs in stand-ins for what a program asks the hub for, and in the probes of devices that are not at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

_STANDINS = "tests/unit/pytest_vram/standins/"
_DEVICES = "tests/unit/pytest_vram/probe/test_other_devices.py"

BUGS: dict[str, Planted] = {
    "pytest_vram/standins/hub": (
        [f"{_STANDINS}test_hub.py"],
        [
            Bug("prepare", "_link(hub_cache(environment), hub)", "pass"),
            Bug("prepare", "name.replace('/', '___').lower()", "name.lower()"),
            Bug("known_names", "find_shape(name) is not None", "True"),
            Bug(
                "known_names",
                "not (cache / _folder_name('models', name) / 'snapshots').is_dir()",
                "True",
            ),
            Bug("write_folder", "folder.exists()", "False"),
            Bug("write_folder", "shutil.rmtree(folder, ignore_errors=True)", "pass"),
            Bug("hub_cache", "environment.get('HUGGINGFACE_HUB_CACHE')", "None"),
            Bug("_snapshot", "(repository / 'refs' / 'main').write_text(_COMMIT)", "pass"),
        ],
    ),
    "pytest_vram/standins/model": (
        [f"{_STANDINS}test_hub.py"],
        [
            Bug("parse_shape", "not name or (equals and (not source))", "not name"),
            Bug("parse_shape", "name.startswith(('.', '/', '~')) and (not equals)", "False"),
            Bug("parse_shape", "source or name", "name"),
            Bug("write_model", "not any((next(given.glob(pattern), None) for pattern in _WEIGHTS))", "True"),
            Bug("write_model", "not any(((folder / name).exists() for name in FILES))", "True"),
        ],
    ),
    "pytest_vram/standins/revisions": (
        [f"{_STANDINS}test_revisions.py"],
        [
            Bug("at_any_revision", "given.get('repo_id') in names", "True"),
            Bug("at_any_revision", "given.get('repo_type') in (None, 'model')", "True"),
            Bug("at_any_revision", "(None, 'model')", "(None,)"),
            Bug("at_any_revision", "given.pop('revision', None)", "pass"),
            Bug("at_any_revision", "dict(zip(parameters, args, strict=False)) | kwargs", "kwargs"),
        ],
    ),
    "pytest_vram/standins/rows": (
        [f"{_STANDINS}test_rows.py"],
        [
            Bug("longest", "_repeated(row[name], words)", "row[name]"),
            Bug("_columns", "return pairs", "return pairs[:1]"),
            Bug("_columns", "_size(usable[name]) or 0", "-(_size(usable[name]) or 0)"),
            Bug("_lengthened", "[*value[:-1], {**value[-1], name: _text(value[-1][name], words)}]", "value"),
            Bug("_text", "text.split() or ['word']", "text.split()"),
            Bug("_is_tokens", "all((type(item) is int for item in value))", "True"),
        ],
    ),
    "pytest_vram/standins/tokenizer": (
        [f"{_STANDINS}test_tokenizer.py"],
        [
            Bug("write_tokenizer", "size < _LEAST", "False"),
            Bug("write_tokenizer", "fields.get('max_position_embeddings') or _LONGEST", "_LONGEST"),
            Bug("_special_tokens", "number[0] if isinstance(number, list) and number else number", "number"),
            Bug("_special_tokens", "found.setdefault(number, token)", "token"),
            Bug("_byte_pairs", "letter not in 'ĠĊ'", "False"),
            Bug(
                "_byte_pairs",
                "[pair for pair in model['merges'] if set(pair) <= kept and ''.join(pair) in kept]",
                "[]",
            ),
        ],
    ),
    "pytest_vram/commands/run_standins": (
        ["tests/unit/pytest_vram/commands/test_run_standins.py"],
        [
            Bug("_longest_length", "max(found, default=0)", "min(found, default=0)"),
            Bug("_longest_length", "number.replace('_', '')", "number.split('_')[0]"),
            Bug("in_place", "length or _FALLBACK", "length"),
            Bug("in_place", "length > 0", "True"),
            Bug("from_arguments", "len(names) < count", "False"),
            Bug("_parse_data", "not file.is_file()", "False"),
            Bug("Prepared.notes_of", "not lines", "False"),
            Bug("Prepared.notes_of", "figures=not self.length_is_known", "figures=False"),
        ],
    ),
    "pytest_vram/commands/run": (
        ["tests/unit/pytest_vram/commands/test_run.py"],
        [
            Bug("_program", "shutil.which(first, path=_scripts())", "None"),
            Bug("_path", "program[0] != sys.executable", "True"),
            Bug("_path", "os.path.dirname(program[0]) == scripts", "True"),
            Bug("_path", "scripts in path.split(os.pathsep)", "False"),
            Bug("run", "_path(program, variables.get('PATH', ''))", "variables.get('PATH', '')"),
        ],
    ),
    "pytest_vram/probe/mps": (
        [_DEVICES],
        [
            Bug("_AfterEachOperator.__torch_dispatch__", "self._sample()", "pass"),
            Bug("MpsProbe.reset_peak", "self._sample()", "pass"),
            Bug("MpsProbe.reset_peak", "self._allocated = self._driver = 0", "pass"),
            Bug("MpsProbe.end_test", "self._mode.__exit__(None, None, None)", "pass"),
            Bug("MpsProbe.notes", "(BETWEEN,)", "()"),
            Bug("MpsProbe._sample", "torch.mps.driver_allocated_memory()", "torch.mps.current_allocated_memory()"),
            Bug("MpsProbe.free_bytes", "torch.mps.driver_allocated_memory()", "torch.mps.current_allocated_memory()"),
        ],
    ),
    "pytest_vram/probe/accelerator": (
        [_DEVICES],
        [
            Bug("AcceleratorProbe.__init__", "(torch.accelerator, self._own)", "(torch.accelerator,)"),
            Bug("AcceleratorProbe.__init__", "(torch.accelerator, self._own)", "(self._own, torch.accelerator)"),
            Bug("AcceleratorProbe.__init__", "self._memory is None", "False"),
            Bug(
                "AcceleratorProbe.peak",
                "self._memory.max_memory_reserved(index)",
                "self._memory.max_memory_allocated(index)",
            ),
            Bug("AcceleratorProbe.reset_peak", "range(self._count)", "range(1)"),
            Bug("AcceleratorProbe.counters", "stats.get('num_ooms', 0)", "0"),
            Bug("AcceleratorProbe._info", "getattr(properties(index), 'total_memory', None)", "None"),
        ],
    ),
    "pytest_vram/probe/select": (
        ["tests/unit/pytest_vram/probe/test_select.py", _DEVICES],
        [
            Bug("torch_build", "'rocm' if getattr(loaded.version, 'hip', None) else 'cpu'", "'cpu'"),
            Bug("torch_build", "(('cuda', 'cuda'), ('hip', 'rocm'))", "(('cuda', 'cuda'),)"),
            Bug("choose", "torch.backends.mps.is_available()", "False"),
            Bug("choose", "torch_build() is None", "False"),
            Bug("torch_build", "spec is None or not spec.origin", "spec is None"),
        ],
    ),
}
