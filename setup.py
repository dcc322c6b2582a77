"""Everything comes from settings.ini, the one list."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="Apache-2.0",
    author=cfg["author"], url=cfg["git_url"], python_requires=f">={cfg['min_python']}",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["htlab*"]), package_data={"htlab": ["assets/*"]},
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": [cfg["console_scripts"]], "nbdev": ["htlab=htlab._modidx:d"]},
)
