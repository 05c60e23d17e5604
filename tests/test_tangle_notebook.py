"""The tangle inside a running notebook, driven through nbclient."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


class Kernel:
    """A notebook kernel that runs cells one by one, in a folder of chapters."""

    def __init__(self, folder: Path):
        self.notebook = nbformat.v4.new_notebook()
        self.client = NotebookClient(
            self.notebook, timeout=120, resources={"metadata": {"path": str(folder)}}
        )

    def run(self, source: str, at: int | None = None) -> str:
        """Execute a cell, a new one or the one `at` an index again; returns what it printed."""
        if at is None:
            self.notebook.cells.append(nbformat.v4.new_code_cell(source))
            at = len(self.notebook.cells) - 1
        else:
            self.notebook.cells[at].source = source
        cell = self.client.execute_cell(self.notebook.cells[at], at)
        return "".join(o.get("text", "") for o in cell.outputs)


@pytest.fixture
def kernel(tmp_path):
    """Makes kernels over a book with one chapter: `nanovllm.m` with a class X."""
    folder = tmp_path / "chapters"
    folder.mkdir()
    for file in (ROOT / "chapters").glob("*.py"):
        shutil.copy(file, folder)
    source = "#| export: nanovllm/m.py\nclass X:\n    def f(self):\n        return 1\n\n\nN = 5"
    first = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(first, folder / "01_first.ipynb")
    clients = []

    def make() -> Kernel:
        made = Kernel(folder)
        context = made.client.setup_kernel()
        context.__enter__()
        clients.append(context)
        return made

    yield make
    for context in clients:
        context.__exit__(None, None, None)


OPEN = "import tangle\ntangle.start(2)\nfrom nanovllm.m import X, N\nimport nanovllm.m as m"
EDIT = "#| export: nanovllm/m.py\nclass X(X):\n    def f(self):\n        return {}"


def test_edited_cell_changes_the_package_without_a_restart(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    assert notebook.run("print(X().f(), m.X().f())") == "1 1\n"
    notebook.run(EDIT.format(2))
    notebook.run("tangle.checkpoint()")
    look = (
        "import nanovllm.m as again\nprint(X().f(), m.X().f(), m.X is X is again.X, X.__mro__[1])"
    )
    assert notebook.run(look) == "2 2 True <class 'object'>\n"
    notebook.run(EDIT.format(3), at=2)  # the same cell, edited, within the same second
    notebook.run("tangle.checkpoint()")
    assert notebook.run(look) == "3 3 True <class 'object'>\n"


def test_an_exercise_is_checked_on_the_package_as_executed(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    right = 'tangle.verify("naive-cost", naive=14_950, ideal=199, tenfold=11)'
    assert notebook.run(right) == "naive-cost: right\n"
    wrong = notebook.run(right.replace("199", "200"))
    assert wrong.startswith("naive-cost: not yet. ideal is not 200: ")
    assert notebook.run('tangle.verify("x")').startswith("x: not yet. there is no exercise 'x'")
    notebook.run(EDIT.format(2))
    notebook.run(
        "import checks, nanovllm.m\n"
        "@checks.exercise\ndef two() -> None:\n"
        "    import nanovllm.m\n    if nanovllm.m.X().f() != 2:\n"
        "        raise checks.Wrong('it is not 2')"
    )
    assert notebook.run("tangle.verify('two')") == "two: right\n"
    notebook.run(EDIT.format(3))
    assert notebook.run("tangle.verify('two')") == "two: not yet. it is not 2\n"


def test_chapter_1_starts_from_chapter_0_and_chapter_0_from_nothing(kernel):
    notebook = kernel()
    folder = Path(notebook.client.resources["metadata"]["path"])
    cell = nbformat.v4.new_code_cell("#| export: nanovllm/options.py\nK = 1")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "00_before.ipynb")
    assert "empty yet" in notebook.run("import tangle\ntangle.start(0)")
    notebook.run(cell.source.replace("1", "2"))
    notebook.run("tangle.checkpoint()")
    assert notebook.run("import nanovllm.options as o\nprint(o.K)") == "2\n"
    assert "as chapter 0 leaves it" in notebook.run("tangle.start(1)")
    assert notebook.run("print(o.K)") == "1\n"


def test_failing_and_unexecuted_cells_do_not_count(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    with pytest.raises(Exception, match="broken"):
        notebook.run(EDIT.format(2) + "\n\n\nraise ValueError('broken')")
    notebook.run("tangle.checkpoint()")
    assert notebook.run("print(X().f())") == "1\n"


def test_constants_follow_the_package(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    notebook.run("#| export: nanovllm/m.py\nN = 7")
    notebook.run("tangle.checkpoint()")
    assert notebook.run("print(N, m.N)") == "7 7\n"


def test_methods_empty_constants_and_equal_names_follow_their_own_module(kernel):
    notebook = kernel()
    notebook.run(OPEN + "\nmethod = X.f")
    notebook.run("#| export: nanovllm/m.py\nEMPTY = None\nlogger = 'm'")
    notebook.run("#| export: nanovllm/other.py\nlogger = 'other'")
    notebook.run("#| export: nanovllm/m.py\nlogger = 'm again'")
    notebook.run("tangle.checkpoint()")
    look = "print(method is X.f, EMPTY, logger)"
    assert notebook.run(look) == "True None m again\n"


def test_deleted_names_and_modules_leave_the_notebook(kernel):
    notebook = kernel()
    notebook.run(OPEN + "\nx = X()")
    notebook.run("#| delete: nanovllm/m.py")
    notebook.run("tangle.checkpoint()")
    assert notebook.run("print('X' in dir(), 'm' in dir(), x.f())") == "False False 1\n"


def test_code_of_a_new_folder_stays_out_of_the_repository(kernel):
    notebook = kernel()
    package = Path(notebook.client.resources["metadata"]["path"]).parent / "nanovllm"
    (package / "kernels/__pycache__").mkdir(parents=True)
    notebook.run(OPEN)
    notebook.run("#| export: nanovllm/kernels/k.py\nK = 1")
    notebook.run("tangle.checkpoint()")
    assert notebook.run("from nanovllm.kernels.k import K\nprint(K)") == "1\n"
    assert not list(package.rglob("*.py"))


def test_bytecode_of_a_child_process_is_never_stale(kernel):
    notebook = kernel()
    notebook.run(OPEN + "\nimport os, subprocess, sys")
    for value in (2, 3):  # one length, and below one time of modification
        notebook.run(EDIT.format(value))
        notebook.run("tangle.checkpoint()\nos.utime(m.__file__, (1e9, 1e9))")
        program = "import nanovllm.m as m; print(m.X().f())"
        run = f"subprocess.check_output([sys.executable, '-c', {program!r}], text=True)"
        assert notebook.run(f"print({run})").strip() == str(value)


def test_a_cell_that_cannot_be_exported_is_left_out_at_once(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    assert "only imports" in notebook.run("#| export: nanovllm/m.py\nN = 6\nprint(N)")
    notebook.run("tangle.checkpoint()")
    assert notebook.run("print(N)") == "5\n"


def test_two_notebooks_do_not_disturb_each_other(kernel):
    one, two = kernel(), kernel()
    for notebook, value in ((one, 10), (two, 20)):
        notebook.run(OPEN)
        notebook.run(EDIT.format(value))
        notebook.run("tangle.checkpoint()")
    assert [n.run("print(X().f())") for n in (one, two)] == ["10\n", "20\n"]


def test_cells_can_be_run_twice_and_tracebacks_name_files(kernel):
    notebook = kernel()
    for _ in range(2):
        notebook.run(OPEN)
        notebook.run(EDIT.format("1 / 0"))
        notebook.run("tangle.checkpoint()")
    with pytest.raises(Exception, match=r"nanovllm/m\.py"):
        notebook.run("X().f()")


def test_subprocesses_see_the_same_package(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    notebook.run(EDIT.format(4))
    notebook.run("tangle.checkpoint()")
    program = "import nanovllm.m as m; print(m.X().f())"
    run = f"subprocess.check_output([sys.executable, '-c', {program!r}], text=True)"
    assert notebook.run(f"import subprocess, sys\nprint({run})").strip() == "4"


START = "import tangle\ntangle.start(2)"


def test_export_cell_finds_the_names_of_its_module(kernel):
    notebook = kernel()
    notebook.run(START)
    notebook.run("#| export: nanovllm/m.py\nclass X(X):\n    def g(self):\n        return N + 1")
    notebook.run("#| export: nanovllm/m.py\nLAST = X, N")
    look = "print(X().g(), X().f(), X.__mro__[1], LAST == (X, N))"
    assert notebook.run(look) == "6 1 <class 'object'> True\n"


def test_export_cell_finds_no_names_of_other_modules(kernel):
    notebook = kernel()
    notebook.run(START)
    with pytest.raises(Exception, match="'N' is not defined"):  # the package would lack an import
        notebook.run("#| export: nanovllm/other.py\nM = N + 1")


def test_export_cell_can_import_what_was_just_exported(kernel):
    notebook = kernel()
    notebook.run(START)
    notebook.run("#| export: nanovllm/deep/one.py\nONE = 1\n\n\nclass A:\n    one = ONE")
    notebook.run("#| export: nanovllm/two.py\nfrom nanovllm.deep.one import ONE\n\nTWO = 2 * ONE")
    notebook.run("#| export: nanovllm/deep/one.py\nONE = 10")
    look = "import nanovllm.two as two\nprint(TWO, two.TWO, ONE, A.one, A.__module__)"
    assert notebook.run(look) == "20 20 10 10 nanovllm.deep.one\n"


def test_cell_finds_the_package_up_to_date_and_its_names_bound(kernel):
    notebook = kernel()
    notebook.run(START)
    assert notebook.run("print(X().f(), [N for _ in range(1)])") == "1 [5]\n"
    notebook.run(EDIT.format(2))
    assert notebook.run("x = X()\nprint(x.f(), X.__module__)") == "2 nanovllm.m\n"
    notebook.run(EDIT.format(3), at=2)
    assert notebook.run("print(X().f(), x.f())") == "3 2\n"
    assert notebook.run("tangle.checkpoint()") == "nanovllm is up to date: m.py\n"
    assert notebook.run("tangle.checkpoint()") == "nanovllm is up to date\n"


def test_the_notebooks_own_names_are_never_hidden(kernel):
    notebook = kernel()
    notebook.run(START + "\nN = 'mine'")
    notebook.run("#| export: nanovllm/m.py\nK = 1\nL = 1")
    notebook.run("L = 'mine too'")
    notebook.run("#| export: nanovllm/m.py\nK = 2")
    assert notebook.run("print(N, K, L)") == "mine 2 mine too\n"
    assert notebook.run("def X():\n    return 'own'\n\n\nprint(X())") == "own\n"
    notebook.run("#| export: nanovllm/m.py\nK = 3")
    assert notebook.run("print(X(), K)") == "own 3\n"


def test_a_name_of_two_modules_is_bound_for_neither(kernel):
    notebook = kernel()
    notebook.run(START)
    notebook.run("#| export: nanovllm/other.py\nN = 6")
    notebook.run("del N\nimport nanovllm.m, nanovllm.other")
    told = notebook.run("try:\n    N\nexcept NameError as error:\n    print(error)")
    assert "N is in nanovllm.m and in nanovllm.other: import one\n" in told
    assert "name 'N' is not defined\n" in told
    assert notebook.run("#| export: nanovllm/other.py\nM = N\n") == ""
    assert notebook.run("print(M)") == "6\n"


def test_package_that_cannot_be_imported_yet_leaves_everything_as_it_was(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    notebook.run(EDIT.format(2))
    notebook.run("#| delete: nanovllm/m.py::N")
    notebook.run("#| export: nanovllm/m.py\nif_n = N")
    look = "import sys\nprint(X().f(), N, m.X().f(), sys.modules['nanovllm.m'] is m)"
    told = notebook.run(look)
    assert told.endswith("2 5 1 True\n") and told.count("\n") == 2
    assert "can't be imported yet: nanovllm/m.py, line 6: NameError: name 'N'" in told
    assert notebook.run("del N").endswith("as they are\n")
    assert notebook.run("print(N)").endswith("as they are\n5\n")
    notebook.run("#| export: nanovllm/m.py\nN = 7\nif_n = N")
    assert notebook.run(look) == "2 7 2 True\n"


def test_export_cell_keeps_quiet_about_a_package_that_it_does_not_need(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    notebook.run("#| delete: nanovllm/m.py::N")
    notebook.run("#| export: nanovllm/m.py\nif_n = N")
    assert notebook.run("#| export: nanovllm/m.py\nimport nanovllm\n\nY = nanovllm") == ""
    with pytest.raises(Exception, match="Unknown"):
        notebook.run("#| export: nanovllm/m.py\nZ = Unknown")
    printed = "".join(o.get("text", "") for o in notebook.notebook.cells[-1].outputs)
    assert "can't be imported yet" in printed


def test_failing_cell_leaves_no_trace_in_the_next(kernel):
    notebook = kernel()
    notebook.run(OPEN)
    with pytest.raises(Exception, match="division"):
        notebook.run(EDIT.format(2) + "\n\n\nN = 1 / 0")
    assert notebook.run("print(X().f(), N)") == "1 5\n"


def test_an_edit_in_chapter_2_changes_what_the_engine_does():
    """The real chapter: sampling is overruled in `postprocess`, and generation obeys."""
    source = nbformat.read(ROOT / "chapters/02_kv_cache.ipynb", as_version=4)
    cells = [c for c in source.cells if c.cell_type == "code"]
    last = max(i for i, c in enumerate(cells) if c.source.startswith("#| export"))
    edited = [c.source for c in cells[: last + 1]]
    at = next(i for i, s in enumerate(edited) if "def postprocess" in s)
    assert "seq.receive(token_id, " in edited[at]
    notebook = Kernel(ROOT / "chapters")
    generate = (
        "from nanovllm import LLM, SamplingParams\n"
        "params = SamplingParams(max_tokens=5, ignore_eos=True)\n"
        "print(LLM(device='cpu').generate('Hello', params, use_tqdm=False)[0]['token_ids'])"
    )
    keep = [
        i for i, s in enumerate(edited) if s.startswith(("#|", "import tangle", "tangle.", "from"))
    ]
    with notebook.client.setup_kernel():
        place = {}
        for i in keep:
            notebook.run(edited[i])
            place[i] = len(notebook.notebook.cells) - 1
        notebook.run("tangle.checkpoint()")
        assert notebook.run(generate) != "[7, 7, 7, 7, 7]\n"
        changed = edited[at].replace("receive(token_id, ", "receive(7, ")
        notebook.run(changed, at=place[at])
        notebook.run("tangle.checkpoint()")
        assert notebook.run(generate) == "[7, 7, 7, 7, 7]\n"
