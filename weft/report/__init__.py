"""What people look at. Table of contents.

tables     a comparison, a verification, a cluster
page       a plan as a page of HTML, with its timeline drawn
output     where results go: to people, or as JSON
progress   bars and log lines while work goes on
"""
