"""Data of earlier versions; what wrote them runs with those alone."""

collect_ignore_glob = ["*/make.py"]
