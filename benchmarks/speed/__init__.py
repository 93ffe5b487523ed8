"""Speed, as ratios measured in one run.

Training: `trials` (its contenders in `trial_steps` and `eager`, its bound in `floor`), `sweep` and `linear_probe`.
Caches: `extract` (its contenders in `extracting` and `with_clip_retrieval`, its bound in `stages`) and `load`.
"""
