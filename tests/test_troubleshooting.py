"""docs/errors.md: every message of the package is on it, or says itself what must be; and what it
quotes is said."""

import ast
import builtins
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reg_kernels"
PAGE = ROOT / "docs" / "errors.md"
ANYTHING = "\0"  # stands in a message for what is put in when it is raised

# Errors that are no messages to a user.
NO_MESSAGES = {
    "KeyError": "a mapping's, with the key alone",
    "AttributeError": "a module's, for a name that it has not",
    "WrongValues": "a benchmark's contender computes something else: `bench` exits with 1",
    "StoreLost": "is caught, and makes the message of a RankError",
}
# Files whose errors are caught, and become a part of another message.
PARTS = {
    "bench/_peers.py": "a peer that is not installed is no contender",
    "cli/_trainer/checkpoint.py": "of `--resume: must name ...`",
    "cli/_trainer/training.py": "of `--resume: must name ...`",
    "cli/_trainer/parallel.py": "of `--resume: must name ...`, or another rank's message",
    "cli/_folder.py": "of `cannot be read`",
    "cli/_study_checks.py": "of `--storage ...: must be a whole ...`",
    "distributed/_checkpoint_reader.py": "of load_checkpoint's `every rank must be able to use`",
}
# What says what must be says what to do.
OF_THE_FORM = re.compile(r"\b(must|expected)\b")
# A name, and behind it what another message says; and variables that hold such a message.
HANDS_ON = re.compile(rf"[-\w]* ?{ANYTHING}?[:; {ANYTHING}]*")
HOLD_A_MESSAGE = {"error", "failure", "first", "problem", "reason", "said", "watch"}


def error_names():
    names = {n for n, x in vars(builtins).items() if isinstance(x, type) and "__cause__" in dir(x)}
    classes = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    return names | {c.name for c in classes if names & {ast.unparse(base) for base in c.bases}}


ERRORS = error_names() | {"CannotTrace", "warn"}


def last_name(call):
    return ast.unparse(call.func).rpartition(".")[2]


def is_error(call):
    return last_name(call) in ERRORS


def returned(function):
    return [x.value for x in ast.walk(function) if isinstance(x, ast.Return) and x.value]


def texts(node, scopes):
    """What an expression may say, with ANYTHING for what is put in. A name is one of the function
    around it, a call one of a function of the same file."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else ANYTHING for part in node.values]
        return ["".join(parts)]
    if isinstance(node, ast.IfExp):
        return texts(node.body, scopes) + texts(node.orelse, scopes)
    if isinstance(node, ast.Name):
        assigned = [x for x in ast.walk(scopes[0]) if isinstance(x, ast.Assign)]
        values = [x.value for x in assigned if node.id in map(ast.unparse, x.targets)]
        return [text for value in values for text in texts(value, scopes)]
    if isinstance(node, ast.Call):
        made = [x for x in ast.walk(scopes[-1]) if getattr(x, "name", "") == last_name(node)]
        functions = [x for x in made if isinstance(x, ast.FunctionDef)]
        return [t for f in functions for value in returned(f) for t in texts(value, [f, *scopes])]
    return []


def calls(node, scopes):
    """Each call that makes an error, or that is raised, and the functions around it."""
    if isinstance(node, ast.FunctionDef):
        scopes = [node, *scopes]
    made = [node.exc] if isinstance(node, ast.Raise) else [node]
    for call in made:
        if isinstance(call, ast.Call) and call.args and (call is not node or is_error(call)):
            yield call, scopes
    for child in ast.iter_child_nodes(node):
        yield from calls(child, scopes)


def messages(path):
    """(line, message) of a file. An error that hands on what another one says has none."""
    if path.suffix != ".py":
        for thrown in re.finditer(r"\b(?:throw|PyErr_\w+\()[^;]+;", path.read_text()):
            text = ANYTHING.join(re.findall(r'"(.*?)"', re.sub(r'"\s*\n\s*"', "", thrown[0])))
            yield path.read_text()[: thrown.start()].count("\n") + 1, text
        return
    tree = ast.parse(path.read_text())
    caught = {x.name for x in ast.walk(tree) if isinstance(x, ast.ExceptHandler)} | HOLD_A_MESSAGE
    for call, scopes in calls(tree, [tree]):
        if last_name(call) in NO_MESSAGES:
            continue
        found = texts(call.args[0], scopes)
        names = {x.id for x in ast.walk(call) if isinstance(x, ast.Name)}
        if not found and is_error(call) and not names & caught:
            found = [f"nothing can read {ast.unparse(call)}"]
        yield from ((call.lineno, text) for text in found)


def files():
    native = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    python = [p for p in PACKAGE.rglob("*.py") if str(p.relative_to(PACKAGE)) not in PARTS]
    return sorted(python + native)


def pattern(text):
    """What a message looks like on the page, wherever its lines break."""
    parts = text.strip(f"{ANYTHING}: ").split(ANYTHING)
    return re.compile(".{0,300}?".join(re.escape(part) for part in parts))


def test_every_message_says_what_must_be_or_is_on_the_page():
    page = " ".join(PAGE.read_text().split())
    missing = {
        f"{path.relative_to(ROOT)}:{line}: {text.replace(ANYTHING, '...')}": None
        for path in files()
        for line, text in messages(path)
        if not HANDS_ON.fullmatch(text) and not OF_THE_FORM.search(text)
        if not pattern(text).search(page)
    }
    assert not missing, "docs/errors.md lacks\n" + "\n".join(missing)


def strings(path):
    """Patterns of all that a file can print: its strings, anything for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            for text in texts(node, []):
                if len(text) >= 20:
                    yield re.compile(".+".join(map(re.escape, text.split(ANYTHING))))


def test_quoted_messages_are_in_the_sources():
    paths = [ROOT / "setup.py", PACKAGE / "backends.py", *PACKAGE.glob("cli/*.py")]
    said = [each for path in paths for each in strings(path)]
    raised = [pattern(text) for path in files() for _, text in messages(path) if len(text) >= 20]
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.S)
    quoted = [line for block in blocks for line in block.splitlines()]
    assert len(quoted) > 20
    for line in quoted:  # who speaks may come first: "reg_kernels: ", "reg-kernels check: "
        ends = [line, *(line[found.end() :] for found in re.finditer(": ", line))]
        is_said = any(each.fullmatch(end) for each in said for end in ends)
        assert is_said or any(each.search(line) for each in raised), line
