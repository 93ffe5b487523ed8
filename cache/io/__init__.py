"""Files and devices.

Atomic writing (`files`), `lock`, local paths and URLs (`paths`), `errors`, `progress`, `device`, `toml`.
"""
