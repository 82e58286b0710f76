"""A configuration for a folder of files: which of them is what, what they hold, and what is missing."""

from ckd_ray.init.draft import Draft, Options, as_json, draft_config, render

__all__ = ["Draft", "Options", "as_json", "draft_config", "render"]
