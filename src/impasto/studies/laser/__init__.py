"""The LASER study: which matrices can be cut down to a low rank, and does that help on questions never seen before?"""
