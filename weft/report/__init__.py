"""What people look at. Table of contents.

tables     a comparison, a verification, a cluster
progress   bars and log lines while work goes on
"""
