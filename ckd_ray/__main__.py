"""`python -m ckd_ray` is `ckd-ray`."""

from ckd_ray.cli import main

if __name__ == "__main__":
    main()
