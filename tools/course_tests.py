"""Run the course's own tests against our adapters: `python tools/course_tests.py COURSE [pytest arguments...]`.

COURSE is an unmodified checkout of one of the course's assignments. Its tests reach the code under test only through
`tests/adapters.py`, so a temporary folder is laid out as a checkout in which that one file is ours:

    T/pytest.ini            ours; no options of either project leak in
    T/tests/adapters.py  -> <package>/tests/adapters.py
    T/tests/*            -> COURSE/tests/*     test files, conftest.py, fixtures, _snapshots
    T/*                  -> COURSE/*           but for the course's library packages, which would shadow ours

With --model FOLDER, a model that the tests name by a path of the course's own machines is read from FOLDER, see
course_model.py.

pytest runs there, in the environment of the package that the checkout belongs to, and its exit status is ours (2 also
stands for a COURSE that cannot be used). Only links are made, so both checkouts stay as they are.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MENTIONS = {"fixtures": r"FIXTURES_PATH|[\"'/]fixtures\b", "_snapshots": r"\b(\w+_)?snapshot\s*[,:)=]|_snapshots\b"}
NOT_LINKED = ("tests", "pyproject.toml", "pytest.ini", "__pycache__")


class CourseError(Exception):
    """What the user can mend, in one sentence."""


@dataclass(frozen=True)
class Checkout:
    """A checkout of one of the course's assignments."""

    folder: Path
    tests: Path

    @property
    def test_files(self) -> list[Path]:
        """The course's test files, by name."""
        return sorted(self.tests.glob("test_*.py"))


def find_checkout(course: str) -> Checkout:
    """The checkout at `course`, which is its folder or the `tests` folder in it.

    Raises:
        CourseError: it is not there or incomplete.
    """
    if not course.strip():
        raise CourseError("give the course's checkout: make course-tests COURSE=/path/to/assignment1-basics")
    path = Path(os.path.abspath(os.path.expanduser(course)))
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise CourseError(f"{path} {problem}: give COURSE the folder of a checkout of the course's repository")
    if (path / "tests").is_dir():
        checkout = Checkout(path, path / "tests")
    elif path.name == "tests" or any(path.glob("test_*.py")):
        checkout = Checkout(path.parent, path)
    else:
        raise CourseError(f"{path} has no tests folder: give COURSE the folder of one assignment, checked out whole")
    tests = checkout.tests
    if not checkout.test_files:
        raise CourseError(f"{tests} has no test_*.py: give COURSE a checkout with the course's test files")
    if not (tests / "adapters.py").is_file():
        raise CourseError(f"{tests} has no adapters.py, so it is not a complete checkout: check the course out anew")
    for folder, mention in MENTIONS.items():
        users = [test.name for test in checkout.test_files if re.search(mention, test.read_text("utf-8", "replace"))]
        if users and not (tests / folder).is_dir():
            raise CourseError(f"{tests} has no {folder} folder, which {users[0]} reads: check the course out anew")
    return checkout


def assignment_of(folder: Path) -> str | None:
    """The assignment that a checkout is of, as `assignment<N>` or its topic; None if neither of its names tells."""
    if found := _assignment_in(folder.name):
        return found
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8")).get("project", {})
    except (FileNotFoundError, ValueError):
        return None
    return _assignment_in(str(project.get("name", "")))


def _assignment_in(name: str) -> str | None:
    found = re.match(r"assignment\d+", name.lower()) or re.search("basics|systems|alignment", name.lower())
    return found.group() if found else None


def find_package(checkout: Checkout, root: Path, forced: str | None = None) -> Path:
    """The package of the repository at `root` that `checkout` is to test: `forced`, or the one it belongs to.

    Raises:
        CourseError: there is none, it has no environment, or the checkout is the package itself.
    """
    packages = sorted(adapters.parent.parent for adapters in root.glob("assignment[0-9]*-*/tests/adapters.py"))
    names = ", ".join(package.name for package in packages) or "none"
    assignment = forced or assignment_of(checkout.folder)
    if assignment is None:
        raise CourseError(
            f"neither the name of {checkout.folder} nor its pyproject.toml tells which assignment it is: "
            f"add --package and one of: {names}"
        )
    package = next((package for package in packages if assignment in (package.name, *package.name.split("-"))), None)
    if package is None:
        what = f"--package {forced}" if forced else f"{checkout.folder} ({assignment})"
        raise CourseError(f"this repository has no package for {what}; it has: {names}")
    if checkout.tests.samefile(package / "tests"):
        raise CourseError(
            f"{checkout.tests} is this repository's own: give COURSE a checkout of the course's repository"
        )
    if not os.access(_python(package), os.X_OK):
        raise CourseError(f"{package.name} has no environment ({_python(package)}): run `make setup` first")
    return package


def _python(package: Path) -> Path:
    return package / ".venv" / "bin" / "python"


def missing_adapters(theirs: Path, ours: Path) -> list[str]:
    """The functions that the course's adapters define and no definition, import or assignment in ours provides."""
    provided = set()
    for node in ast.walk(_parse(ours)):
        if isinstance(node, ast.FunctionDef):
            provided.add(node.name)
        elif isinstance(node, ast.alias):
            provided.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            provided.add(node.id)
    asked = [node.name for node in _parse(theirs).body if isinstance(node, ast.FunctionDef)]
    return [name for name in asked if name not in provided]


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise CourseError(f"{file} is not valid Python ({error}): check it out anew") from error


def lay_out(checkout: Checkout, package: Path, folder: Path) -> None:
    """Fill the empty `folder` with links to `checkout`, and with the adapters of `package` instead of the course's."""
    tests = folder / "tests"
    tests.mkdir()
    for entry in checkout.folder.iterdir():
        if entry.name not in NOT_LINKED and not entry.name.startswith((".", "cs336")):
            (folder / entry.name).symlink_to(entry)
    for entry in checkout.tests.iterdir():
        if entry.name not in ("adapters.py", "__pycache__", ".pytest_cache"):
            (tests / entry.name).symlink_to(entry)
    (tests / "adapters.py").symlink_to(package / "tests" / "adapters.py")
    if not (tests / "__init__.py").exists():
        (tests / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")


def find_model(folder: Path | None) -> Path | None:
    """The folder of the model, made absolute, if there is one.

    Raises:
        CourseError: it holds no model of transformers.
    """
    if folder is None:
        return None
    model = folder.expanduser().resolve()
    if not (model / "config.json").is_file():
        raise CourseError(f"{model} has no config.json: give MODEL the folder of a model of transformers")
    return model


def run_tests(checkout: Checkout, package: Path, arguments: Sequence[str], model: Path | None = None) -> int:
    """Run the tests of `checkout` against the adapters of `package`; `arguments` go to pytest, whose status returns.

    Models that are not where the tests look for them are read from the folder `model`.
    """
    with tempfile.TemporaryDirectory(prefix="course-tests-") as temporary:
        folder = Path(temporary).resolve()
        lay_out(checkout, package, folder)
        command = [str(_python(package)), "-m", "pytest", "-c", f"{folder}/pytest.ini", "--rootdir", str(folder)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        if model:
            command += ["-p", "course_model"]
            paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment |= {"COURSE_MODEL": str(model), "PYTHONPATH": os.pathsep.join(paths)}
        status = subprocess.call([*command, "-p", "no:cacheprovider", *arguments], cwd=folder, env=environment)
    return status if status >= 0 else 128 - status


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line against the repository at `root` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="course-tests",
        description="Run the course's own tests, from a checkout of one of its assignments, against our adapters.",
        epilog="Other arguments go to pytest, such as -k tokenizer, -x or tests/test_model.py.",
        allow_abbrev=False,
    )
    parser.add_argument("course", metavar="COURSE", nargs="?", default="", help="the checkout, or its tests folder")
    parser.add_argument("--package", help="the package to test, if not told by the checkout, e.g. assignment1-basics")
    parser.add_argument("--model", type=Path, help="a folder with the model that the tests of Assignment 5 ask for")
    options, arguments = parser.parse_known_args(argv)
    try:
        checkout = find_checkout(options.course)
        model = find_model(options.model)
        package = find_package(checkout, Path(os.path.abspath(root)), options.package)
        adapters = package / "tests" / "adapters.py"
        missing = missing_adapters(checkout.tests / "adapters.py", adapters)
        count = len(checkout.test_files)
        print(f"{count} test files of {checkout.tests}, adapters {adapters}, python {_python(package)}", flush=True)
        if missing:
            print(f"warning: {adapters} lacks {', '.join(missing)}; the tests of these will fail", flush=True)
        return run_tests(checkout, package, arguments, model)
    except (CourseError, OSError) as error:
        print(f"course-tests: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
