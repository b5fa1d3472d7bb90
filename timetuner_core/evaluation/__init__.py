"""How good a few-step sampler is: distance to a many-step teacher, to the data, and to a mixture's exact density.

Every figure comes with each sample's influence on it, so that one paired bootstrap gives the interval of any
figure's change: rows are drawn again, the same before and after, and the figure is moved by the mean of their
influences (its linearisation, Hampel 1974). For a mean that is the ordinary bootstrap. For Fréchet and Wasserstein
distances, which are biased upwards at finite size, computing them anew on drawn-again rows would add that bias a
second time, and the interval would miss the very change it is for; linearised, it covers the change to be expected
at this number of samples, bias included.
"""
