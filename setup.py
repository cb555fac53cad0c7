"""Packaging: every fact comes from settings.ini; the run notebooks and the sample data travel in the wheel."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Issues": f"{cfg['git_url']}/issues"},
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["medllm", "medllm.*"]) + ["medllm.runs", "medllm.samples", "medllm.page"],
    package_dir={"medllm.runs": "nbs/runs", "medllm.samples": "data", "medllm.page": "nbs/page"},
    package_data={"medllm.runs": ["*.ipynb"], "medllm.samples": ["*.json", "*.txt"],
                  "medllm.page": ["*.html", "*.css", "*.js"]},
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "papermill.engine": ["medllm=medllm.records.papermill_engine:LazyEngine"],
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
