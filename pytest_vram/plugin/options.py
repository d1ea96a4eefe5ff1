"""The command-line options and ini settings. Every pytest session imports this module, so it imports nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pytest

MARK_HELP = (
    "vram(*, max_gb=None, max_mb=None, metric='allocated', scope='test', enforce=False, max_leak_mb=None, "
    "min_free_gb=None, max_host_gb=None, device=None, search=False, ranks='card'): the most GPU memory that the test "
    "may use; 1 GB is 2**30 bytes."
)
VALUES_HELP = "vram_values: the test needs values that a GPU computed; it is skipped where the device computes nothing."

RANKS_HELP = (
    "vram_ranks(count, *, timeout=600, backend=None): run the test once in each of `count` ranks of one process group, "
    "and hold its budget for each card."
)


class Option(NamedTuple):
    """One setting: ``--vram-name`` on the command line, ``vram_name`` in the ini file; the command line wins."""

    name: str
    help: str
    kind: str = "text"
    """``text``, ``flag`` or ``list``."""
    metavar: str | None = None
    ini_only: bool = False

    @property
    def dest(self) -> str:
        """The setting's name in the ini file and among pytest's options."""
        return f"vram_{self.name}"

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return f"--vram-{self.name.replace('_', '-')}"


OPTIONS = (
    Option(name="report", kind="flag", help="print a table of GPU memory by test at the end"),
    Option(
        name="output",
        kind="list",
        metavar="PATH",
        help="write the report to PATH: .json, .md, .csv, .html, .sarif or .codequality.json; may be repeated",
    ),
    Option(
        name="history",
        metavar="DIR",
        help="add this session's peaks, with the commit, to DIR, for `python -m pytest_vram history`",
    ),
    Option(
        name="timeline",
        kind="flag",
        help="record memory over time, by category and module, for the report; an .html report does so by itself",
    ),
    Option(
        name="gpu",
        metavar="auto|cuda|dry[:CARD[xN]]|host|nvml|off",
        help=(
            "what to measure on. auto: a GPU if there is one, else a dry GPU, else CPU tensors. dry: PyTorch's real"
            " allocator over a stub driver, for instance dry:rtx-4080, or dry:a100-80x2 for two cards (`python -m"
            " pytest_vram cards`)"
        ),
    ),
    Option(name="require", metavar="cuda|dry|host", help="fail at the start unless figures are of this kind; for CI"),
    Option(name="baseline", metavar="FILE", help="compare peaks with FILE; a test that grew past the tolerance fails"),
    Option(name="update_baseline", kind="flag", help="write the peaks of the tests that ran into the baseline FILE"),
    Option(name="tolerance", metavar="PCT", help="growth over the baseline that passes, in percent (default 2)"),
    Option(
        name="suggest",
        kind="flag",
        help="print a marker for each measured test that has none, or whose budget is much too large",
    ),
    Option(name="top", metavar="N", help="allocations shown for a test that broke its budget (default 5)"),
    Option(name="max_gb", metavar="GB", ini_only=True, help="budget of tests that have no marker, in GB (2**30 bytes)"),
    Option(name="metric", metavar="METRIC", ini_only=True, help="metric of vram_max_gb: allocated, reserved or device"),
    Option(
        name="on_unmeasured",
        metavar="skip|fail|warn",
        ini_only=True,
        help="what happens to a test whose budget cannot be measured: skip or fail (default skip)",
    ),
)


def add_options(parser: pytest.Parser) -> None:
    """Register every option and the ini setting of the same name."""
    group = parser.getgroup("vram", "GPU memory budgets (pytest-vram)")
    for option in OPTIONS:
        if not option.ini_only:
            settings: dict[str, Any] = {"dest": option.dest, "default": None, "help": option.help}
            if option.kind == "flag":
                settings |= {"action": "store_true"}
            elif option.kind == "list":
                settings |= {"action": "append", "metavar": option.metavar}
            else:
                settings |= {"metavar": option.metavar}
            group.addoption(option.flag, **settings)
        kinds = {"flag": "bool", "list": "args", "text": "string"}
        parser.addini(option.dest, help=option.help, type=kinds[option.kind], default=None)  # type: ignore[arg-type]  # pytest names the kinds in a Literal


def early_gpu(config: pytest.Config) -> str | None:
    """Return the ``gpu`` setting before pytest has finally parsed its options, or None if the user chose nothing."""
    value = getattr(config.known_args_namespace, "vram_gpu", None)
    return value if value is not None else config.getini("vram_gpu") or None


def asked_for(config: pytest.Config) -> bool:
    """Return whether the user gave any setting; a session without settings may still use the marker."""
    return any(value(config, option) not in (None, [], "") for option in OPTIONS)


def value(config: pytest.Config, option: Option) -> Any:
    """Return a setting as the user gave it, or None if it was not given; the command line wins over the ini file."""
    if not option.ini_only:
        given = config.getoption(option.dest, None)
        if given not in (None, False):
            return given
    value = config.getini(option.dest)
    return None if value in ("", [], False) else value
