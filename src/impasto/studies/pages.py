"""The page of whatever study a run folder holds. Needs no model."""

from __future__ import annotations

from pathlib import Path

from impasto.result import Page
from impasto.store import Store
from impasto.studies.laser import kept as laser


def page_of(folder: str | Path) -> Page:
    """The page of a study, finished or not, from its run folder alone; of a LASER study before others.

    Raises:
        StoreError: the folder holds no study.
    """
    with Store(folder, readonly=True) as store:
        if laser.is_laser(store):
            return laser.page_of(folder)
    from impasto.studies.run import page_of as page_of_painters

    return page_of_painters(folder)
