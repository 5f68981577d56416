"""Every file of the package that git knows is in the wheel and in the sdist: the embedded pair, templates, py.typed."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
listed = subprocess.run(["git", "ls-files", "src/crossdiff"], capture_output=True, text=True, check=True).stdout.split()
wanted = {file.removeprefix("src/") for file in listed}
in_wheel = set(zipfile.ZipFile(wheel).namelist())
with tarfile.open(sdist) as archive:
    in_sdist = {name.partition("/src/")[2] for name in archive.getnames()}
for path, held in ((wheel, in_wheel), (sdist, in_sdist)):
    missing = sorted(wanted - held)
    assert wanted and not missing, f"{path.name} lacks {missing}"
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, all {len(wanted)} files of the package")
assert not [name for name in in_wheel if not name.startswith(("crossdiff/", "crossdiff-"))], "the wheel holds other packages"
