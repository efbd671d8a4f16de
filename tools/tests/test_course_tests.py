import os
import shutil
import sys
from pathlib import Path
from textwrap import dedent

import pytest

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import course_tests  # noqa: E402 (found through the line above)

ADAPTERS = "def run_linear(x):\n    return 2 * x\n"
CONFTEST = """
    from pathlib import Path

    import pytest

    def pytest_addoption(parser):
        parser.addoption("--snapshot-exact", action="store_true")

    @pytest.fixture
    def snapshot(request):
        return Path("tests/_snapshots", request.node.name + ".txt").read_text()
"""
TESTS = """
    from .adapters import run_linear
    from .common import FIXTURES_PATH

    def test_fixture():
        assert run_linear(int((FIXTURES_PATH / "number.txt").read_text())) == 42

    def test_snapshot(snapshot):
        assert str(run_linear(4)) == snapshot
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(text))
    return folder


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in (folder, *folder.rglob("*"))}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder that temporary folders are made in; no plugins, so that the inner pytest starts fast."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def root(tmp_path):
    """A repository with one package, in a path with spaces; its environment is the one these tests run in."""
    root = write(tmp_path / "our repo", {"assignment1-basics/tests/adapters.py": ADAPTERS})
    add_environment(root / "assignment1-basics")
    (root / "assignment1-basics/pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--no-such-option"\n')
    return root


def add_environment(package: Path) -> None:
    python = write(package, {".venv/bin/python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'}) / ".venv/bin/python"
    python.chmod(0o755)


@pytest.fixture
def course(tmp_path):
    """A checkout as the course gives it out: with adapters that are not implemented, and options of its own."""
    return write(
        tmp_path / "the course" / "assignment1-basics",
        {
            "pyproject.toml": '[project]\nname = "cs336_basics"\n[tool.pytest.ini_options]\naddopts = "--no-option"\n',
            "cs336_basics/__init__.py": "raise ImportError('the library of the course')\n",
            "tests/__init__.py": "",
            "tests/adapters.py": "def run_linear(x):\n    raise NotImplementedError\n",
            "tests/common.py": 'import pathlib\nFIXTURES_PATH = pathlib.Path(__file__).resolve().parent / "fixtures"\n',
            "tests/conftest.py": CONFTEST,
            "tests/fixtures/number.txt": "21",
            "tests/_snapshots/test_snapshot.txt": "8",
            "tests/test_linear.py": TESTS,
        },
    )


def error_of(capfd, arguments: list[str], root: Path) -> str:
    """The one line that a run with `arguments` must end with."""
    assert course_tests.main(arguments, root) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("course-tests: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def test_course_tests_pass_with_our_adapters(course, root, capfd):
    assert course_tests.main([str(course)], root) == 0
    out, err = capfd.readouterr()
    assert "2 passed" in out
    assert err == ""
    package = root / "assignment1-basics"
    assert out.splitlines()[0] == (
        f"1 test files of {course / 'tests'}, adapters {package / 'tests/adapters.py'}, "
        f"python {package / '.venv/bin/python'}"
    )
    assert "warning" not in out


def test_tests_folder_itself_and_no_init(course, root, capfd):
    (course / "tests/__init__.py").unlink()
    assert course_tests.main([str(course / "tests")], root) == 0
    assert "2 passed" in capfd.readouterr().out


def test_relative_path_and_home(course, monkeypatch):
    monkeypatch.chdir(course.parent)
    monkeypatch.setenv("HOME", str(course.parent))
    whole = course_tests.Checkout(course, course / "tests")
    assert course_tests.find_checkout(course.name) == whole
    assert course_tests.find_checkout(f"~/{course.name}/tests/") == whole
    monkeypatch.chdir(course)
    assert course_tests.find_checkout(".") == whole
    assert course_tests.find_checkout("tests") == whole


def test_failing_course_test_gives_status_1(course, root, capfd):
    (course / "tests/_snapshots/test_snapshot.txt").write_text("9")
    assert course_tests.main([str(course)], root) == 1
    assert "1 failed, 1 passed" in capfd.readouterr().out


def test_nothing_is_written(course, root, temporary, capfd):
    before = listing(course), listing(root)
    assert course_tests.main([str(course)], root) == 0
    assert (listing(course), listing(root)) == before
    assert list(temporary.iterdir()) == []


def test_temporary_folder_goes_when_the_tests_fail(course, root, temporary, capfd):
    write(course, {"tests/test_broken.py": "import no_such_module\n"})
    before = listing(course), listing(root)
    assert course_tests.main([str(course)], root) == 2
    assert "no_such_module" in capfd.readouterr().out
    assert (listing(course), listing(root)) == before
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "summary"),
    [
        (["-k", "fixture or nothing"], "1 passed, 1 deselected"),
        (["tests/test_linear.py::test_snapshot"], "1 passed"),
        (["--", "--collect-only"], "2 tests collected"),
    ],
)
def test_arguments_go_to_pytest(course, root, capfd, arguments, summary):
    assert course_tests.main([str(course), *arguments], root) == 0
    assert summary in capfd.readouterr().out


def test_no_test_selected_is_pytests_status_5(course, root, capfd):
    assert course_tests.main([str(course), "-k", "nothing"], root) == 5


def test_killed_pytest_is_not_a_success(course, root, capfd):
    write(
        course, {"tests/test_linear.py": "import os, signal\n\ndef test():\n    os.kill(os.getpid(), signal.SIGKILL)\n"}
    )
    assert course_tests.main([str(course)], root) == 137


def test_working_folder_has_the_checkout_but_not_its_library(course, root, capfd):
    test = """
        import os
        import sys
        from importlib.util import find_spec

        def test_data():
            assert open("data/lines.txt").read() == "hello"
            assert open("run.sh").read() == "true"

        def test_library():
            names = "assignment1 cs336_basics cs336-basics .git .venv __pycache__".split()
            assert not [name for name in names if os.path.lexists(name)]
            assert open("pytest.ini").read() == "[pytest]\\ntestpaths = tests\\n"
            assert os.path.isfile("tests/sub/notes.txt")
            spec = find_spec("cs336_basics")
            assert sys.dont_write_bytecode
            assert spec is None or "the course" not in str(spec.origin)
    """
    write(
        course,
        {
            ".git/HEAD": "main",
            ".venv/pyvenv.cfg": "",
            "cs336-basics/pyproject.toml": "",
            "data/lines.txt": "hello",
            "pytest.ini": "[pytest]\naddopts = --no-such-option\n",
            "run.sh": "true",
            "tests/__pycache__/adapters.cpython-311.pyc": "not bytecode",
            "tests/sub/notes.txt": "",
            "tests/test_folder.py": test,
        },
    )
    before = listing(course)
    assert course_tests.main([str(course), "tests/test_folder.py"], root) == 0
    assert "2 passed" in capfd.readouterr().out
    assert listing(course) == before


def test_lacking_adapters_are_a_warning(course, root, capfd):
    theirs = """
        import numpy

        def run_linear(x): ...
        def run_softmax(x): ...
        def run_imported(x): ...
        def run_assigned(x): ...
        def get_tokenizer(x): ...
    """
    write(course, {"tests/adapters.py": theirs})
    write(
        root,
        {"assignment1-basics/tests/adapters.py": ADAPTERS + "from math import pi as run_imported\nrun_assigned = 1\n"},
    )
    assert course_tests.main([str(course)], root) == 0
    warnings = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "lacks run_softmax, get_tokenizer;" in warnings[0]


@pytest.mark.parametrize("arguments", [[], [""], [" "]])
def test_error_no_course(root, capfd, arguments):
    error = error_of(capfd, arguments, root)
    assert error == "course-tests: give the course's checkout: make course-tests COURSE=/path/to/assignment1-basics\n"


def test_error_missing_folder(tmp_path, root, capfd):
    assert f"{tmp_path / 'nowhere'} does not exist: give COURSE" in error_of(capfd, [str(tmp_path / "nowhere")], root)


def test_error_unknown_home(root, capfd):
    assert "~no-such-user/course does not exist" in error_of(capfd, ["~no-such-user/course"], root)


def test_error_file(tmp_path, root, capfd):
    file = write(tmp_path, {"course.zip": ""}) / "course.zip"
    assert f"{file} is not a folder: give COURSE" in error_of(capfd, [str(file)], root)


def test_error_no_tests_folder(course, root, capfd):
    assert f"{course.parent} has no tests folder: give COURSE" in error_of(capfd, [str(course.parent)], root)


@pytest.mark.parametrize("given", ["", "tests"])
def test_error_no_test_files(course, root, capfd, given):
    (course / "tests/test_linear.py").unlink()
    assert f"{course / 'tests'} has no test_*.py: give COURSE" in error_of(capfd, [str(course / given)], root)


def test_error_no_adapters(course, root, capfd):
    (course / "tests/adapters.py").unlink()
    error = error_of(capfd, [str(course)], root)
    assert f"{course / 'tests'} has no adapters.py, so it is not a complete checkout: check the course out" in error


@pytest.mark.parametrize("folder", ["fixtures", "_snapshots"])
def test_error_missing_data(course, root, capfd, folder):
    shutil.rmtree(course / "tests" / folder)
    error = error_of(capfd, [str(course)], root)
    assert f"{course / 'tests'} has no {folder} folder, which test_linear.py reads: check the course out" in error


def test_data_that_no_test_reads_may_be_missing(course, root, capfd):
    for folder in ("fixtures", "_snapshots"):
        shutil.rmtree(course / "tests" / folder)
    test = """
        import pytest  # its fixtures; no snapshot_download
        from .adapters import run_linear

        @pytest.mark.usefixtures("request")
        def test_linear():
            assert run_linear(3) == 6
    """
    write(course, {"tests/test_linear.py": test})
    assert course_tests.main([str(course)], root) == 0


@pytest.mark.parametrize("text", ["def run_linear(:\n", "\0"])
def test_error_broken_adapters(course, root, capfd, text):
    (course / "tests/adapters.py").write_text(text)
    assert f"{course / 'tests/adapters.py'} is not valid Python (" in error_of(capfd, [str(course)], root)


def test_error_no_environment(course, root, capfd):
    (root / "assignment1-basics/.venv/bin/python").unlink()
    assert "assignment1-basics has no environment" in (error := error_of(capfd, [str(course)], root))
    assert "run `make setup` first" in error


def test_error_our_own_package(root, capfd):
    package = write(root / "assignment1-basics", {"tests/test_ours.py": "def test(): pass\n"})
    error = error_of(capfd, [str(package)], root)
    assert f"{package / 'tests'} is this repository's own: give COURSE a checkout of the course's" in error


@pytest.mark.parametrize("pyproject", [None, "[project]\nname = 'homework'\n", "[build-system]\n", "not toml", "\xff"])
def test_error_unknown_assignment(course, root, capfd, pyproject):
    folder = course.rename(course.parent / "homework")
    (folder / "pyproject.toml").unlink()
    if pyproject is not None:
        (folder / "pyproject.toml").write_text(pyproject, encoding="latin-1")
    error = error_of(capfd, [str(folder)], root)
    assert f"neither the name of {folder} nor its pyproject.toml tells which assignment" in error
    assert "add --package and one of: assignment1-basics\n" in error


@pytest.mark.parametrize("name", ["assignment2-systems", "alignment", "assignment3-scaling"])
def test_error_no_such_package_yet(course, root, capfd, name):
    folder = course.rename(course.parent / name)
    error = error_of(capfd, [str(folder)], root)
    assert f"this repository has no package for {folder} ({name.split('-')[0]}); it has: assignment1-basics\n" in error


def test_error_forced_package_that_is_not_there(course, root, capfd):
    error = error_of(capfd, [str(course), "--package", "assignment9-music"], root)
    assert "this repository has no package for --package assignment9-music; it has: assignment1-basics\n" in error


def test_error_of_the_operating_system(course, root, capfd):
    (root / "assignment1-basics/.venv/bin/python").write_text("#!/no/such/interpreter\n")
    assert course_tests.main([str(course)], root) == 2
    assert capfd.readouterr().err.startswith("course-tests: [Errno")


BASICS, SYSTEMS, ALIGNMENT = "assignment1-basics", "assignment2-systems", "assignment5-alignment"


@pytest.mark.parametrize(
    ("folder", "project", "package"),
    [
        ("assignment1-basics", None, BASICS),
        ("assignment2-systems-main", None, SYSTEMS),
        ("Assignment5", None, ALIGNMENT),
        ("spring2025-basics", None, BASICS),
        ("my_systems", None, SYSTEMS),
        ("alignment", None, ALIGNMENT),
        ("assignment2", "cs336-basics", SYSTEMS),
        ("a1", "cs336-basics", BASICS),
        ("a2", "cs336_systems", SYSTEMS),
        ("a5", "alignment", ALIGNMENT),
        ("assignment", "assignment5-alignment", ALIGNMENT),
    ],
)
@pytest.mark.parametrize("forced", [None, SYSTEMS])
def test_recognised_package(tmp_path, folder, project, package, forced):
    root = write(tmp_path / "ours", {f"{name}/tests/adapters.py": ADAPTERS for name in (BASICS, SYSTEMS, ALIGNMENT)})
    for name in (BASICS, SYSTEMS, ALIGNMENT):
        add_environment(root / name)
    course = write(tmp_path / folder, {"tests/adapters.py": ADAPTERS, "tests/test_linear.py": ""})
    if project:
        (course / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    checkout = course_tests.find_checkout(str(course))
    assert course_tests.find_package(checkout, root, forced) == root / (forced or package)


def test_forced_package(course, root, capfd):
    folder = course.rename(course.parent / "homework")
    (folder / "pyproject.toml").unlink()
    assert course_tests.main([str(folder), "-q", "--package", "assignment1-basics", "--snapshot-exact"], root) == 0
    assert "2 passed" in capfd.readouterr().out


MODEL_TEST = """
    from pathlib import Path
    from transformers import AutoConfig

    def test_model():
        elsewhere = Path("/no such cluster/models/Qwen2.5-Math-1.5B")
        assert AutoConfig.from_pretrained(elsewhere).hidden_size == 48
        assert AutoConfig.from_pretrained(str(elsewhere)).hidden_size == 48
        assert AutoConfig.from_pretrained(Path(__file__).resolve().parent / "fixtures" / "model").hidden_size == 64
"""


def config_of(hidden_size: int) -> str:
    return f'{{"model_type": "qwen2", "hidden_size": {hidden_size}}}'


def test_a_model_that_is_elsewhere(course, root, tmp_path, capfd):
    write(course, {"tests/test_model.py": MODEL_TEST, "tests/fixtures/model/config.json": config_of(64)})
    model = write(tmp_path / "a model", {"config.json": config_of(48)})
    assert course_tests.main([str(course), "--model", str(model), "-k", "test_model"], root) == 0
    assert "1 passed" in capfd.readouterr().out
    assert course_tests.main([str(course), "-k", "test_model"], root) == 1


def test_error_no_model(course, root, tmp_path, capfd):
    assert "has no config.json" in error_of(capfd, [str(course), "--model", str(tmp_path)], root)


def test_real_adapters(tmp_path, capfd):
    if not os.access(TOOLS.parent / "assignment1-basics/.venv/bin/python", os.X_OK):
        pytest.skip("assignment1-basics has no environment; `make setup` creates it")
    test = """
        import torch

        from .adapters import run_linear, run_softmax

        def test_linear():
            weights, x = torch.randn(3, 5), torch.randn(2, 5)
            assert torch.allclose(run_linear(5, 3, weights, x), x @ weights.T, atol=1e-6)

        def test_softmax():
            x = torch.randn(4, 7)
            assert torch.allclose(run_softmax(x, dim=-1), torch.softmax(x, dim=-1))
    """
    course = write(tmp_path / "assignment1-basics", {"tests/adapters.py": "", "tests/test_model.py": test})
    assert course_tests.main([str(course)]) == 0
    assert "2 passed" in capfd.readouterr().out
