"""Measures the product against peers and floors, side by side: `make bench`.

`goals.py` lists the rows; each is a function of its name in the file of its group. `product.py`
holds everything that is asked of kt, `measure.py` the arithmetic, `results.py` what is written.
"""
