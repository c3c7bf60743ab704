"""Which kernel function raises the change that a notifier is being told of.

Kernels of other years tell some changes otherwise than 6.1 does, and it is the place that decides.
"""

from __future__ import annotations

from hmmlab.model.machine import Machine

__all__ = ["CHANGE_PTE_SITES", "INVALIDATE_PAGE_SITES", "raised_by"]

#: Functions that told of one page with ``mmu_notifier_invalidate_page``, after they had changed its
#: word. Both were ``try_to_unmap_one`` then; the third place, which cleans a page, is left out.
INVALIDATE_PAGE_SITES = ("try_to_unmap", "try_to_migrate")

#: Functions that set a word with ``set_pte_at_notify`` where a listener may rely on it: a copy on
#: write, and the two halves of merging equal pages (KSM). The fourth, uprobes, is left out.
CHANGE_PTE_SITES = ("wp_page_copy", "write_protect_page", "replace_page")


def raised_by(machine: Machine) -> str:
    """The kernel function that raised the change of which a notifier is being told, "" for none."""
    outwards = machine.actor.stack[::-1]
    return next((name for name in outwards if "invalidate_range" not in name), "")
