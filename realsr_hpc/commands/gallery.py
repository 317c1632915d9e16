"""Show results: realsr-hpc gallery run=RUN_DIR[,RUN_DIR] [evaluation=DIR] [restored=DIR] [output=gallery.html].

Writes one self-contained HTML file: input, steps of the chain of thought, output and truth with a before/after slider,
the rewards of a group's rollouts side by side, filters by run, step, degradation and reward. serve=true serves it on
127.0.0.1 (port=8000) until Ctrl-C. limit=200 shows the newest entries of each source.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc.config.arguments import read_arguments, read_count, read_flag

if TYPE_CHECKING:
    from realsr_hpc.gallery import Entry

DEFAULTS: dict[str, str | None] = {
    "run": None,
    "evaluation": None,
    "restored": None,
    "output": "gallery.html",
    "title": "Results",
    "limit": "200",
    "serve": "false",
    "port": "8000",
}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage or nothing to show."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        limit, port = read_count(given, "limit", 1), read_count(given, "port")
        show = read_flag(given, "serve")
        output = Path(given["output"] or "").resolve()
        if output.is_dir():
            raise ValueError(f"output={output}: a folder; name a file, such as gallery.html")
        count = _write(given, limit, output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{count} entries: {output} ({output.stat().st_size / 1e6:.1f} MB)")
    if show:
        serve(output, port)
    return 0


def serve(page: Path, port: int) -> None:
    """Serve the page, and no other file, on the loopback interface until Ctrl-C."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path in ("/", f"/{page.name}")
            body = page.read_bytes() if found else b"not here"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def told_apart(read: Mapping[Path, Sequence[Entry]]) -> list[Entry]:
    """All entries; sources with the same name in several folders get the folder as prefix."""
    folders: dict[str, list[Path]] = {}
    for folder, entries in read.items():
        for source in {entry.source for entry in entries}:
            folders.setdefault(source, []).append(folder.parent)

    def named(folder: Path, entry: Entry) -> Entry:
        alike = folders[entry.source]
        above = os.path.relpath(folder.parent, os.path.commonpath(alike))
        return entry if len(alike) == 1 else replace(entry, source=os.path.normpath(f"{above}/{entry.source}"))

    return [named(folder, entry) for folder, entries in read.items() for entry in entries]


def _write(given: dict[str, str | None], limit: int, output: Path) -> int:
    from realsr_hpc.gallery import read_evaluation, read_restored, read_run, write_page

    readers = {"run": read_run, "evaluation": read_evaluation, "restored": read_restored}
    read: dict[Path, list[Entry]] = {}
    for key, reader in readers.items():
        for folder in (Path(name).resolve() for name in (given[key] or "").split(",") if name):
            if folder in read:
                raise ValueError(f"{key}={folder}: is given twice; name it once")
            read[folder] = reader(folder)[-limit:]
    entries = told_apart(read)
    if not entries:
        raise ValueError("give run=RUN_DIR, evaluation=DIR or restored=DIR, several with commas")
    write_page(entries, output, given["title"] or "")
    return len(entries)
