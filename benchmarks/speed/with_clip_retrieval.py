"""clip-retrieval's inference over a folder of images: run by an interpreter that has it, prints one JSON object.

    /path/to/python benchmarks/speed/with_clip_retrieval.py MODEL CHECKPOINT IMAGES

It imports nothing of this project, since clip-retrieval asks for other versions of what both use.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from importlib import metadata


def main(model: str, checkpoint: str, images: str) -> None:
    """Runs it."""
    from all_clip import load_clip
    from clip_retrieval.clip_inference.worker import worker

    # its own way to name a checkpoint file
    name = f"open_clip:{model}/{checkpoint}"
    readers = os.cpu_count() or 1
    batch = 64
    # loaded and warm before the clock starts, as for the others
    load_clip(clip_model=name, use_jit=False, warmup_batch_size=batch, clip_cache_path=None)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        # what clip_inference starts; around it there is only a reader of its statistics, which sleeps for seconds
        worker(
            tasks=[0],
            input_dataset=images,
            output_folder=folder,
            output_partition_count=1,
            input_format="files",
            batch_size=batch,
            num_prepro_workers=readers,
            enable_text=False,
            enable_image=True,
            enable_metadata=False,
            clip_model=name,
            use_jit=False,
        )
        seconds = time.perf_counter() - started
        count = _rows(folder)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    row = {
        "images": count,
        "seconds": seconds,
        "peak_rss_bytes": 1024 * (own + readers * reader),
        "version": metadata.version("clip-retrieval"),
    }
    print(json.dumps(row))


def _rows(folder: str) -> int:
    import numpy as np

    files = os.path.join(folder, "img_emb")
    return sum(len(np.load(os.path.join(files, name), mmap_mode="r")) for name in os.listdir(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
