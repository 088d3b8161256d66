"""`asv publish`, and the scripts that its pages load from the network beside them, where npm can bring them.

So the dashboard opens without a network, too. Without npm the pages stay as asv writes them.

    python benchmarks/publish.py [CONFIGURATION]
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Of asv 0.6: the file's name in the address, the package and its version, the file in it. (Flot's package has no
# smaller files, and stupidtable's first version is not in the registry.)
SCRIPTS = {
    "jquery-3.3.1.min.js": ("jquery", "3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot", "0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot", "0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot", "0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot", "0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars", "1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin", "1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5", "2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap", "3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap", "3.1.1", "dist/css/bootstrap.min.css"),
}
# In a tag: the address, and what holds the file against a hash and a foreign host.
ADDRESS = re.compile(
    r'(src|href)="https://[^"]*/([^"/]+\.(?:js|css))"(?:\s+(?:integrity|crossorigin|referrerpolicy)="[^"]*")*'
)


def bring_home(html, cache):
    """Put the scripts that html/index.html names beside it."""
    index = html / "index.html"
    page = index.read_text()
    names = [name for _, name in ADDRESS.findall(page)]
    missing = [name for name in names if name not in SCRIPTS]
    if missing or shutil.which("npm") is None:
        print(f"The pages load their scripts from the network ({'unknown: ' + missing[0] if missing else 'no npm'}).")
        return
    wanted = sorted({f"{package}@{version}" for package, version, _ in SCRIPTS.values()})
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "package.json").write_text("{}")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", *wanted]
    if subprocess.run(command, cwd=cache, stdout=subprocess.DEVNULL).returncode:
        print("The pages load their scripts from the network (npm failed).")
        return
    for name in names:
        package, _, file = SCRIPTS[name]
        shutil.copy(cache / "node_modules" / package / file, html / name)
    index.write_text(ADDRESS.sub(r'\1="\2"', page))


def publish(configuration):
    asv = [sys.executable, "-m", "asv", "--config", configuration.name, "publish"]
    subprocess.run(asv, cwd=configuration.parent, check=True)
    html = configuration.parent / json.loads(configuration.read_text())["html_dir"]
    bring_home(html, html.parent / "npm")


if __name__ == "__main__":
    publish(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("asv.conf.json")).resolve())
