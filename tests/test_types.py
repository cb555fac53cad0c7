"""What mypy is told about `@patch`: a method that is there, one that is not, a property, and a cache that was kept."""
import subprocess
import sys

import pytest
from conftest import ROOT

MODULE = '''from fastcore.basics import patch

class Box:
    def twice(self)->int: return 2*self.size()

@patch
def size(self:Box)->int: return 3

@patch(as_prop=True)
def half(self:Box)->float: return self.size()/2

print(Box().twice(), Box().half + 1, Box().{name})
'''


@pytest.fixture
def checked(tmp_path):
    "What mypy says of a module, with the cache of the times before."
    pytest.importorskip("mypy", reason="mypy is not here: make types")
    (tmp_path/"medllm").mkdir()
    (tmp_path/"medllm/__init__.py").touch()
    (tmp_path/"mypy.ini").write_text(f"[mypy]\nplugins = {ROOT}/tests/mypy_patch.py\nignore_missing_imports = True\n")
    def check(name):
        (tmp_path/"medllm/box.py").write_text(MODULE.format(name=name))
        return subprocess.run([sys.executable, "-m", "mypy", "medllm"], cwd=tmp_path, capture_output=True, text=True).stdout
    return check


def test_a_patched_method_is_one(checked):
    for _ in range(2): assert "Success" in checked("size()")
    assert checked("length()").count("error:") == 1 and 'has no attribute "length"' in checked("length()")
    assert '"float" not callable' in checked("half()")
