"""Files and devices: what every other package of the cache builds on; it imports none of them.

Atomic writing (`files`), `lock`, local paths and URLs (`paths`), `errors`, `prefetch`, `progress`, `device`, `toml`,
the folder for downloads (`home`), and the connection to Ray (`ray_cluster`).
"""
