"""`python -m vlm_nemo VERB …`, for torchrun and launch/local.sh. Guarded: checkpoint writers are spawned processes."""

from vlm_nemo.cli import entry

if __name__ == "__main__":
    entry()
