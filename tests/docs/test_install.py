"""Every `pip install` that a reader meets works: what is named is this folder, an extra of it, or a known package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FROM_A_CLONE = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
        *(ROOT / "examples").glob("*.py"),
    ]
)
PACKAGE = sorted((ROOT / "gradsurgery").rglob("*.py"))
# Up to the end of the shell's words: quoted strings, and names with extras.
COMMAND = re.compile(r"""pip install((?: +(?:"[^"\n]+"|'[^'\n]+'|\{[^{}\n]+\}|(?:-r|-e)\b|[\w.\-\[\]=<>~]+))+)""")
WORD = re.compile(r"""\{[^{}\n]+\}|"[^"\n]+"|'[^'\n]+'|[^\s"']+""")


def extras() -> dict[str, set[str]]:
    """The extras that pyproject.toml declares, and the packages of each; those of the library itself under ''."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    lines = re.sub(r"#.*", "", table)
    found = {name: packages(body) for name, body in re.findall(r"^(\w+) = \[(.*?)\]\s*$", lines, re.M | re.S)}
    own = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
    return found | {"": packages(re.sub(r"#.*", "", own[1]))}


def packages(listed: str) -> set[str]:
    return set(re.findall(r'"([\w.\-]+)', listed))


EXTRAS = extras()
KNOWN = set().union(*EXTRAS.values())


def wrong(text: str, *, clone: bool) -> list[str]:
    """What the commands of a text ask for, and would not get.

    Args:
        text: A page or a module.
        clone: Whether its reader stands in a clone, where `.` is this library.

    Returns:
        Words of these commands.
    """
    found = []
    for command in COMMAND.findall(text):
        for word in (word.strip("\"'") for word in WORD.findall(command)):
            here = re.fullmatch(r"\.(?:\[(\w+(?:,\w+)*)\])?", word)
            if here and clone:
                found += [word for name in (here[1] or "").split(",") if name not in EXTRAS]
            elif not (word.startswith("{") or word == "-e" or re.sub(r"[\[=<>~].*", "", word) in KNOWN):
                found.append(word)
    return found


def test_extras_are_read():
    assert EXTRAS["monitor"] == {"matplotlib", "rich"}
    assert EXTRAS[""] == {"torch", "numpy", "scipy"}
    assert {"demo", "frameworks", "peers"} <= set(EXTRAS)
    assert {"torchjd", "softadapt"} <= EXTRAS["peers"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ('pip install "gradsurgery[monitor]"', ["gradsurgery[monitor]"]),
        ("pip install gradsurgery matplotlib", ["gradsurgery"]),
        ('`pip install ".[monitors]"`', [".[monitors]"]),
        ('pip install ".[monitor,demo]"; python x.py', []),
        ("pip install . and then", []),
        ("pip install -e .", []),
        ("`pip install matplotlib rich` brings", []),
        ("f'pip install {package}'", []),
    ],
)
def test_a_command_that_fails_is_found(command, expected):
    assert wrong(command.replace(" and then", "\n"), clone=True) == expected


def test_a_message_of_the_package_names_no_folder():
    assert wrong("pip install .", clone=False) == ["."]
    assert wrong('pip install ".[monitor]"', clone=False) == [".[monitor]"]


def test_commands_of_pages_and_examples_work():
    texts = {path: path.read_text(encoding="utf-8") for path in FROM_A_CLONE}
    assert {str(path.relative_to(ROOT)): bad for path, text in texts.items() if (bad := wrong(text, clone=True))} == {}
    assert sum(len(COMMAND.findall(text)) for text in texts.values()) >= 8


def test_commands_of_messages_work_wherever_the_library_is_installed():
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE}
    assert {str(path.relative_to(ROOT)): bad for path, text in texts.items() if (bad := wrong(text, clone=False))} == {}
    assert sum(len(COMMAND.findall(text)) for text in texts.values()) >= 4
