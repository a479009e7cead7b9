"""Data only: one TOML for each device, link and cluster. `partition.profiles` reads them."""
